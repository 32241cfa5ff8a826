// Checks at the border. MIWV_CHECK is for what a caller can get wrong and throws std::invalid_argument, which the
// bindings turn into ValueError. MIWV_ASSERT is for what only we can get wrong and aborts.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace miwv {

template <class... Parts>
std::string concat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

}  // namespace miwv

#define MIWV_CHECK(condition, ...)                                              \
  do {                                                                          \
    if (!(condition)) throw std::invalid_argument(::miwv::concat(__VA_ARGS__)); \
  } while (0)

#define MIWV_ASSERT(condition)                                                        \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "miwv_fast: %s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                   \
    }                                                                                 \
  } while (0)
