// Who wrote and who read each byte of a block's shared memory, and when: the check for races and uninitialised reads.
//
// One clock per launch ticks at every synchronisation, of a block or of a warp. Two accesses by different threads are
// ordered if the block has synchronised since the earlier one, or if both threads are of one warp and that whole warp
// has. Limits: a warp collective whose mask leaves out a lane of the warp orders nothing here (a false alarm is
// possible where part of a warp exchanges values through memory), and shuffles and votes count as synchronisation like
// __syncwarp, although CUDA promises the order of memory accesses for __syncwarp alone.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace simt::detail {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;

struct Hazard {
  enum Kind { kUninitialised, kWriteAfterWrite, kWriteAfterRead, kReadAfterWrite } kind = kUninitialised;
  size_t offset = 0;   // of the byte
  unsigned other = 0;  // the thread whose access came first
};

class Shadow {
 public:
  void start_launch(size_t bytes) {
    cells_.assign((bytes + 3) / 4 * 4, Cell{});
    now_ = 0;
    warp_since_.fill(0);
  }
  void start_block() { block_start_ = block_since_ = ++now_; }  // what earlier blocks left counts as never written
  void sync_block() { block_since_ = ++now_; }
  void sync_warp(unsigned warp) { warp_since_[warp] = ++now_; }

  // False if the access must not be: then hazard() says why.
  template <bool kWrite>
  bool access(size_t offset, size_t size, unsigned thread) {
    for (size_t word = offset & ~size_t{3}; word < offset + size; word += 4) {
      Cell* cell = &cells_[word];
      const bool whole = word >= offset && word + 4 <= offset + size;
      if (!cell->split && whole) {
        if (!touch<kWrite>(word, thread)) return false;
        continue;
      }
      if (!cell->split) {
        cell[1] = cell[2] = cell[3] = *cell;
        cell->split = true;
      }
      for (size_t byte = word < offset ? offset : word; byte < word + 4 && byte < offset + size; ++byte)
        if (!touch<kWrite>(byte, thread)) return false;
    }
    return true;
  }

  const Hazard& hazard() const { return hazard_; }

 private:
  struct Access {
    uint32_t time = 0;
    uint32_t thread = 0;
  };
  // One per byte. While a word is only ever accessed whole, its first byte's cell stands for all four (not `split`).
  struct Cell {
    Access write, read[2];
    bool split = false;
  };

  bool ordered(const Access& earlier, unsigned thread) const {
    return earlier.time < block_since_ || earlier.thread == thread ||
           (earlier.thread / kWarp == thread / kWarp && earlier.time < warp_since_[thread / kWarp]);
  }

  template <bool kWrite>
  bool touch(size_t byte, unsigned thread) {
    Cell& cell = cells_[byte];
    const auto found = [&](Hazard::Kind kind, const Access& earlier) {
      hazard_ = {kind, byte, earlier.thread};
      return false;
    };
    if (!kWrite && cell.write.time < block_start_) return found(Hazard::kUninitialised, cell.write);
    if (!ordered(cell.write, thread))
      return found(kWrite ? Hazard::kWriteAfterWrite : Hazard::kReadAfterWrite, cell.write);
    if (kWrite) {
      for (const Access& read : cell.read)
        if (!ordered(read, thread)) return found(Hazard::kWriteAfterRead, read);
      cell.write = {now_, thread};
    } else {
      remember_read(cell.read, thread);
    }
    return true;
  }

  // Two readers are enough: two unordered threads of one warp show any other thread's write, and any write of one of
  // them; of two warps, any write at all. A reader that is ordered before this one is shown by it.
  void remember_read(Access (&read)[2], unsigned thread) {
    const Access now = {now_, thread};
    if (read[0].thread == thread)
      read[0] = now;
    else if (read[1].thread == thread)
      read[1] = now;
    else if (ordered(read[0], thread))
      read[0] = now;
    else if (ordered(read[1], thread) ||
             (read[0].thread / kWarp == read[1].thread / kWarp && read[0].thread / kWarp != thread / kWarp))
      read[1] = now;
  }

  std::vector<Cell> cells_;
  std::array<uint32_t, kMaxThreads / kWarp> warp_since_{};
  Hazard hazard_;
  uint32_t now_ = 0, block_start_ = 0, block_since_ = 0;
};

}  // namespace simt::detail
