#include "check.hpp"

int main() {
  int failed = 0;
  for (const check::Test& test : check::tests()) {
    try {
      test.run();
      std::printf("ok    %s\n", test.name);
    } catch (const std::exception& error) {
      std::printf("FAIL  %s\n      %s\n", test.name, error.what());
      ++failed;
    }
    std::fflush(stdout);
  }
  std::printf("%zu tests, %d failed\n", check::tests().size(), failed);
  return failed != 0;
}
