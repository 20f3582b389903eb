// What both halves of the self-test are written with.
#pragma once
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "simt.h"

using simt::launch;
using simt::shared;
using std::string;
using std::vector;

constexpr unsigned kAll = ~0u;
inline bool failed = false;

// A check returns what is wrong, "" if nothing is.
inline void check(const char* name, const std::function<string()>& body) {
  string why;
  try {
    why = body();
  } catch (const std::exception& e) {
    why = string("threw ") + e.what();
  }
  if (why.empty())
    std::printf("ok %s\n", name);
  else
    std::printf("FAILED %s: %s\n", name, why.c_str());
  failed = failed || !why.empty();
}

inline void finds(const char* name, const vector<string>& words, const std::function<void()>& body) {
  check(name, [&]() -> string {
    try {
      body();
    } catch (const simt::Error& e) {
      for (const string& word : words)
        if (string(e.what()).find(word) == string::npos) return "'" + word + "' is not in: " + e.what();
      return "";
    }
    return "no error";
  });
}

template <class T>
string same(const vector<T>& got, const vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (!(got.at(i) == expected[i]))
      return "[" + std::to_string(i) + "] is " + std::to_string(got[i]) + ", not " + std::to_string(expected[i]);
  return "";
}
