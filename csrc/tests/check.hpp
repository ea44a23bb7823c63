// A test framework of one page: TEST("name") { CHECK(...); }.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

namespace check {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

// What `call` throws must be an Error whose message holds `words`.
template <class Error, class Call>
void throws(const char* file, int line, const std::string& words, Call call) {
  std::string message;
  try {
    call();
  } catch (const Error& error) {
    message = error.what();
    if (message.find(words) != std::string::npos) return;
    fail(file, line, "expected the words \"" + words + "\", came \"" + message + "\"");
  }
  fail(file, line, "expected an error with \"" + words + "\", came none");
}

}  // namespace check

#define CHECK_JOIN_(a, b) a##b
#define CHECK_JOIN(a, b) CHECK_JOIN_(a, b)
#define TEST_AS(name, function, entry)                  \
  static void function();                               \
  static const check::Registered entry{name, function}; \
  static void function()
#define TEST(name) TEST_AS(name, CHECK_JOIN(test_, __LINE__), CHECK_JOIN(entry_, __LINE__))
#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) check::fail(__FILE__, __LINE__, "not " #condition); \
  } while (false)
#define CHECK_THROWS(Error, words, ...) check::throws<Error>(__FILE__, __LINE__, words, [&] { __VA_ARGS__; })
