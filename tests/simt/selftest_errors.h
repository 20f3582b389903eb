// What the runtime must find: each check launches a kernel that is wrong, and reads the words of the error.
#pragma once
#include "selftest_check.h"

struct __align__(16) Pack {
  float v[4];
};

inline void wrong_memory() {
  finds("race_write_write",
        {"race in kernel 'k'", "block (1,0,0)", "offset 8", "thread (0,0,0)", "thread (1,0,0)", "has written"}, [] {
          launch(
              "k",
              +[] {
                if (blockIdx.x == 1) shared<int>(0)[2] = 1;
              },
              3, 2, 64);
        });
  finds("race_write_then_read", {"race", "nothing synchronises"}, [] {
    launch(
        "k",
        +[] {
          auto p = shared<int>(0);
          p[threadIdx.x] = 1;
          __syncthreads();
          p[threadIdx.x] = 2;
          (void)int(p[(threadIdx.x + 1) % blockDim.x]);  // the barrier between the phases is missing
        },
        1, 32, 128);
  });
  finds("race_read_then_write", {"race", "nothing synchronises"}, [] {
    launch(
        "k",
        +[] {
          auto p = shared<int>(0);
          p[threadIdx.x] = 1;
          __syncthreads();
          (void)int(p[0]);
          if (threadIdx.x == 7) p[0] = 2;
        },
        1, 32, 128);
  });
  finds("race_two_readers_one_writes", {"race", "(0,0,0)", "(33,0,0)"}, [] {
    launch(
        "k",
        +[] {
          auto p = shared<int>(0);
          if (threadIdx.x == 0) p[0] = 1;
          __syncthreads();
          if (threadIdx.x == 0 || threadIdx.x == 33) (void)int(p[0]);
          __syncwarp();
          if (threadIdx.x == 0) p[0] = 2;
          __syncwarp();
          __syncthreads();
        },
        1, 64, 4);
  });
  finds("race_across_warps", {"race", "has written"}, [] {
    launch(
        "k",
        +[] {
          auto p = shared<int>(0);
          p[threadIdx.x] = 1;
          __syncwarp();
          (void)int(p[threadIdx.x ^ 1]);
          __syncwarp();
          p[threadIdx.x ^ 32] = 2;
        },
        1, 64, 256);
  });
  finds("race_outside_the_mask", {"race", "thread (16,0,0)"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x == 3) shared<int>(0)[0] = 1;
          if (threadIdx.x < 16) __syncwarp(0xffff);
          __any_sync(threadIdx.x < 16 ? 0xffff : 0xffff0000, 1);
          if (threadIdx.x == 16) shared<int>(0)[0] = 2;
        },
        1, 32, 128);
  });
  finds("race_in_a_byte", {"race", "offset 5"}, [] {
    launch(
        "k",
        +[] {
          shared<unsigned char>(0)[4 + threadIdx.x] = 1;
          if (threadIdx.x == 0) shared<unsigned char>(0)[5] = 1;
        },
        1, 2, 8);
  });
  finds("race_of_a_word_and_a_byte", {"race", "offset 7"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x == 0)
            *shared<int>(4) = 1;
          else
            *shared<unsigned char>(7) = 1;
        },
        1, 2, 8);
  });
  finds("race_in_a_wide_element", {"race", "offset 12"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x == 0)
            shared<float>(0)[3] = 1;
          else
            *shared<Pack>(0) = Pack{};
        },
        1, 2, 16);
  });
  finds("out_of_bounds", {"out of bounds", "writes 4 bytes at shared byte offset 128", "has 130", "thread (32,0,0)"},
        [] {
          launch(
              "k",
              +[] {
                if (threadIdx.x == 32) shared<int>(0)[32] = 1;
              },
              1, 64, 130);
        });
  finds("out_of_bounds_below", {"out of bounds", "reads 8 bytes at shared byte offset -8"},
        [] { launch("k", +[] { (void)double(*(shared<double>(0) - 1)); }, 1, 1, 64); });
  finds("misaligned", {"misaligned", "offset 2,", "multiple of 4"},
        [] { launch("k", +[] { *shared<float>(2) = 1; }, 1, 1, 64); });
  finds("uninitialised", {"uninitialised read", "offset 9", "block (0,0,0)"}, [] {
    launch(
        "k",
        +[] {
          shared<unsigned char>(8)[0] = 1;
          (void)uint16_t(shared<uint16_t>(8)[0]);
        },
        1, 1, 64);
  });
  finds("uninitialised_in_later_block", {"uninitialised read", "offset 4"}, [] {
    vector<unsigned> ticket(1);
    const auto kernel = +[](unsigned* ticket) {
      auto p = shared<int>(4);
      if (atomicAdd(ticket, 1u) == 0) *p = 1;
      (void)int(*p);
    };
    launch("k", kernel, 2, 1, 64, ticket.data());
  });
}

inline void divergence() {
  finds("barrier_not_reached", {"barrier divergence", "__syncthreads", "has returned"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x < 40) __syncthreads();
        },
        1, 64, 0);
  });
  finds("barrier_after_early_exit", {"barrier divergence", "thread (3,0,0) has returned"}, [] {
    launch(
        "k",
        +[] {
          __syncthreads();
          if (threadIdx.x == 3) return;
          __syncthreads();
        },
        1, 64, 0);
  });
  finds("barriers_of_two_kinds", {"barrier divergence", "__syncthreads_or", "__syncthreads_count"},
        [] { launch("k", +[] { threadIdx.x ? __syncthreads_or(1) : __syncthreads_count(1); }, 1, 32, 0); });
  finds("barrier_against_shuffle", {"barrier divergence", "__shfl_xor_sync", "__syncthreads"},
        [] { launch("k", +[] { threadIdx.x < 16 ? (void)__shfl_xor_sync(kAll, 1, 1) : __syncthreads(); }, 1, 32, 0); });
  finds("collectives_of_two_masks", {"barrier divergence", "mask 0x0000ffff", "mask 0xffffffff"},
        [] { launch("k", +[] { __any_sync(threadIdx.x < 8 ? 0xffff : kAll, 1); }, 1, 32, 0); });
  finds("syncwarp_after_exit", {"barrier divergence", "__syncwarp", "lane 31", "has returned"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x < 31) __syncwarp();
        },
        1, 32, 0);
  });
  finds("shuffle_after_exit", {"lane that is not there", "lane 5, thread (37,0,0), which has returned"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x != 37) __shfl_down_sync(kAll, 1.f, 1);
        },
        1, 64, 0);
  });
  finds("shuffle_outside_mask", {"lane that is not there", "reads lane 16", "thread (0,0,0)"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x < 16) __shfl_xor_sync(0xffff, 1.f, 16);
        },
        1, 32, 0);
  });
  finds("shuffle_outside_block", {"lane that is not there", "reads lane 8", "thread (4,0,0)"},
        [] { launch("k", +[] { __shfl_down_sync(kAll, 1.f, 4); }, 1, 8, 0); });
  finds("shuffle_from_outside", {"lane that is not there", "own lane is not in the mask 0x00000001"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x == 1) __shfl_sync(1, 1.f, 0);
        },
        1, 32, 0);
  });
  finds("shuffle_width", {"width of __shfl_sync is 12"},
        [] { launch("k", +[] { __shfl_sync(kAll, 1.f, 0, 12); }, 1, 32, 0); });
}

inline void wrong_launches() {
  static const auto nothing = +[] {};
  const struct {
    dim3 grid, block;
    simt::SharedBytes shared;
    const char* word;
  } bad[] = {{1, 1025, 0, "block (1025,1,1)"}, {1, {32, 33}, 0, "(32,33,1)"},  {1, {1, 0}, 0, "block (1,0,1)"},
             {1, {1, 1, 65}, 0, "(1,1,65)"},   {0, 1, 0, "grid (0,1,1)"},      {{1, 65536}, 1, 0, "(1,65536,1)"},
             {1, 1, 48 * 1024 + 1, "49153"},   {1, 1, {2, 1}, "2 shared"},     {1, 1, {1, 1u << 20}, "1048576"},
             {~0u, 1, 0, "(4294967295,1,1)"},  {{1, 1, 65536}, 1, 0, "65536)"}};
  for (size_t i = 0; i < std::size(bad); ++i)
    finds(("bad_launch_" + std::to_string(i)).c_str(), {"bad launch of kernel 'nothing'", bad[i].word},
          [&] { launch("nothing", nothing, bad[i].grid, bad[i].block, bad[i].shared); });
  finds("nested_launch", {"bad launch in kernel 'outer'", "'inner'"},
        [] { launch("outer", +[] { launch("inner", nothing, 1, 1, 0); }, 1, 1, 0); });
  finds("outside_a_kernel", {"outside a kernel"}, [] { __syncthreads(); });
  finds("exception", {"exception in kernel 'k'", "thread (2,0,0)", "what it says"}, [] {
    launch(
        "k",
        +[] {
          if (threadIdx.x == 2) throw std::runtime_error("what it says");
        },
        1, 3, 0);
  });
}
