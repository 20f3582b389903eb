// A 3x3 convolution with padding 1 and its gradients, of float32, bfloat16 or float16, in float32 arithmetic: as
// defined where an image has few channels, else by Winograd's F(4x4, 3x3) or F(2x2, 3x3) (Lavin & Gray 2016,
// arXiv:1509.09308), 36 products where the definition has 144, or 16 where it has 36. Filled in conv.cpp, executed by
// the SIMD translation units. Images are [N, H, W, channels]. Weights and their gradients are of the images' dtype or
// float32, as what lies between is.
#pragma once
#include <cstdint>

namespace fractal::cpu {

constexpr int64_t kRowsOfBlock = 8;  // a block of tiles is a multiple, but for the last

// Winograd. A tile is T x T output pixels and the P x P input pixels under it, P = T + 2; P*P is the number of its
// points after the transform, and everything between the transforms is as many matrix products.
static constexpr int points(int tile) { return (tile + 2) * (tile + 2); }
// How many rows of a panel of transformed weights one point is from the next: a power of two would put all points of a
// weight into one set of the cache.
static constexpr int64_t weight_rows(int64_t channels) { return channels + 5; }

struct Conv {
  int64_t N, H, W;
  int64_t in, out;        // channels of the product: of what is read and of what is written
  const void* x;          // [N, H, W, in]
  void* y;                // [N, H, W, out]
  int tile;               // T
  int64_t across, tiles;  // tiles of a row of an image, of the batch
  int64_t block;          // tiles that are taken together, at most
  int64_t blocks;         // of the forward: into how many the tiles are cut
};

// Weights [out, 3, 3, in]; `turned`: by half a turn, of the gradient of x, whose channels are the output.
struct Filters {
  const void* w;
  int64_t out, in;
  bool turned;
};

struct WeightGradient {
  Conv x;                 // in = C_in
  const void* grad;       // [N, H, W, C_out]
  int64_t columns;        // C_out
  int64_t first, count;   // the tiles of this pass
  bool add;               // to the sums of an earlier pass
  float *inputs, *grads;  // transformed: [points][block][C_in + pad], [points][block][C_out + pad]
  float* sums;            // [parts][points][C_out][C_in]
  int64_t parts;
};

// As defined: a few rows of an image at a time, copied between zeros.
struct Direct {
  int64_t N, H, W, in, out;
  const void* x;        // [N, H, W, in]
  const void* grad;     // [N, H, W, out]
  void* y;              // [N, H, W, out]
  int64_t band, bands;  // rows that are taken together; how many times in an image
  int64_t pitch;        // floats of a row of the copy
  float* sums;          // [parts][out][3][sum_row]
  int64_t parts, sum_row;
};

// Uninitialised floats, aligned to a cache line. A thread keeps those up to 64 MiB for its next convolution: memory
// fresh from the system costs more than the transform that fills it.
class Buffer {
 public:
  explicit Buffer(int64_t size);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data;

 private:
  int64_t size_;
};

// For one size of tiles. Panels are two vectors of channels, or one where there are no more.
struct Winograd {
  // Where tiles are many, blocks of them share all transformed weights, [out / panel][points][weight_rows(in)][panel],
  // or, turned, [in / panel][points][weight_rows(out)][panel].
  void (*weights)(const Filters& filters, float* u, int64_t begin, int64_t end);  // channels of the output
  void (*forward)(const Conv& conv, const float* u, int64_t begin, int64_t end);  // blocks of tiles
  // Where they are few, in one block, panels share all transformed tiles, [points][tiles][in + pad].
  void (*inputs)(const Conv& conv, float* v, int64_t begin, int64_t end);                                  // tiles
  void (*channels)(const Conv& conv, const Filters& filters, const float* v, int64_t begin, int64_t end);  // of output
  void (*gradient_tiles)(const WeightGradient& job, int64_t begin, int64_t end);    // tiles of the pass
  void (*gradient_product)(const WeightGradient& job, int64_t begin, int64_t end);  // (point, group of kGroup rows)
  void (*gradient_weights)(const WeightGradient& job, void* dw, int64_t begin, int64_t end);  // output channels
  // Of one pass and one part both at once, for tiles of 2 x 2: larger ones are never so few.
  void (*gradient_channels)(const WeightGradient& job, void* dw, int64_t begin, int64_t end);  // output channels
};

// Of images and of weights: float32; bfloat16; float16; bfloat16 with float32; float16 with float32.
constexpr int kConvDtypes = 5;

struct ConvKernels {
  int64_t (*plane)(int64_t rows, int64_t channels);  // floats of a plane of transformed values
  Winograd tiles_of_2, tiles_of_4;

  void (*direct_weights)(const void* w, int64_t out, int64_t in, float* u);               // of the output alone
  void (*direct_forward)(const Direct& job, const float* u, int64_t begin, int64_t end);  // items: bands of the batch
  void (*direct_gradient)(const Direct& job, int64_t begin, int64_t end);                 // parts
  void (*direct_sum)(const Direct& job, void* dw, int64_t begin, int64_t end);            // output channels
};

constexpr int64_t kLine = 16;   // floats of a cache line; channels are a multiple
constexpr int64_t kGroup = 64;  // output channels of an item of gradient_product

// The first tile of block b.
static inline int64_t first_tile(const Conv& c, int64_t b) {
  const int64_t tile = (c.tiles + kRowsOfBlock - 1) / kRowsOfBlock * b / c.blocks * kRowsOfBlock;
  return tile < c.tiles ? tile : c.tiles;
}

#if defined(__x86_64__)
namespace avx2 {
extern const ConvKernels conv_kernels[kConvDtypes];
}
namespace avx512 {
extern const ConvKernels conv_kernels[kConvDtypes];
}
#endif

}  // namespace fractal::cpu
