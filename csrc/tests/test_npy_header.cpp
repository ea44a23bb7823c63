#include <random>

#include "../npy_header.hpp"
#include "check.hpp"
#include "temp_file.hpp"

using namespace rmt;

namespace {

const std::string kDict = "{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }";

NpyHeader parse(const std::string& file) { return parse_npy_header(file, file.size(), "t.npy"); }

std::string with(const std::string& dict) { return npy(dict, "abcdef"); }

}  // namespace

TEST("npy: versions 1, 2 and 3") {
  for (int version : {1, 2, 3}) {
    const std::string file = npy(kDict, "abcdef", version);
    const NpyHeader header = parse(file);
    CHECK(header.dtype == DType::kUint16);
    CHECK(header.count == 3);
    CHECK(header.data_offset == file.size() - 6);
  }
  CHECK_THROWS(InputError, "expected .npy version 1, 2 or 3, came 4", parse(npy(kDict, "abcdef", 4)));
}

TEST("npy: dict in any order, double quotes, no last comma") {
  CHECK(parse(with("{\"shape\":(3,),\"fortran_order\":False,\"descr\":\"<u2\"}")).count == 3);
  CHECK(parse(with("{'descr': '|u1', 'fortran_order': False, 'shape': (6,)}   ")).count == 6);
}

TEST("npy: damaged dicts") {
  const char* damaged[] = {"",
                           "{",
                           "}",
                           "{}",
                           "{'descr'}",
                           "{'descr': }",
                           "{'descr': '<u2'}",
                           "{'descr': '<u2', 'descr': '<u2'}",
                           "{'descr': '<u2', 'fortran_order': Maybe, 'shape': (3,)}",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': (3,",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': (-3,)}",
                           "{'descr': '<u2, 'fortran_order': False, 'shape': (3,)}",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999,)}",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': (3,)} x",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': 3}",
                           "{'descr': '<u2', 'fortran_order': False, 'shape': (3,), 'more': 1}",
                           "{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (3,)}"};
  for (const char* dict : damaged) CHECK_THROWS(InputError, "t.npy: damaged .npy header: expected", parse(with(dict)));
}

TEST("npy: another shape, order or type") {
  CHECK_THROWS(InputError, "expected a 1-D array in C order, came shape (1, 3); save array.ravel()",
               parse(with("{'descr': '<u2', 'fortran_order': False, 'shape': (1, 3)}")));
  CHECK_THROWS(InputError, "came shape ()", parse(with("{'descr': '<u2', 'fortran_order': False, 'shape': ()}")));
  CHECK_THROWS(InputError, "came shape (3,) in Fortran order",
               parse(with("{'descr': '<u2', 'fortran_order': True, 'shape': (3,)}")));
  for (const char* descr : {">u2", "<f4", "<u8", "<i2", "|b1", "<U3"}) {
    CHECK_THROWS(InputError, std::string("int32 or int64, came \"") + descr,
                 parse(with(std::string("{'descr': '") + descr + "', 'fortran_order': False, 'shape': (3,)}")));
  }
}

TEST("npy: sizes that are not the file's") {
  const std::string whole = with(kDict);
  CHECK_THROWS(InputError, "(truncated)", parse(whole.substr(0, whole.size() - 1)));
  CHECK_THROWS(InputError, "(too long)", parse(whole + "x"));
  for (const char* count : {"18446744073709551615", "9223372036854775808"}) {
    CHECK_THROWS(InputError, "more than any file holds",
                 parse(with(std::string("{'descr': '<u2', 'fortran_order': False, 'shape': (") + count + ",)}")));
  }
}

TEST("npy: every truncation of the header is an error") {
  const std::string whole = with(kDict);
  for (size_t size = 0; size < whole.size(); ++size) CHECK_THROWS(InputError, "t.npy: ", parse(whole.substr(0, size)));
}

TEST("npy: a header that claims a longer text than there is") {
  std::string file = npy(kDict, "abcdef", 2);
  for (int i = 8; i < 12; ++i) file[i] = '\xff';
  CHECK_THROWS(InputError, "truncated or damaged .npy header", parse(file));
}

TEST("npy: mutated headers parse or say why") {
  std::mt19937 random(7);
  for (int round = 0; round < 20000; ++round) {
    std::string file = npy(kDict, "abcdef", 1 + round % 3);
    for (int change = 0; change < 1 + round % 4; ++change) file[random() % file.size()] = static_cast<char>(random());
    try {
      const NpyHeader header = parse(file);
      CHECK(header.data_offset + header.count * info(header.dtype).item_size == file.size());
    } catch (const InputError&) {
    }
  }
}
