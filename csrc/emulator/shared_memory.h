// The shared memory of the block that runs: what threads see, what the asynchronous proxy sees, and guards around it.
#pragma once

#include <cstdint>
#include <vector>

namespace tf::emulator {

class SharedMemory {
  public:
    // The 32-bit address of the first byte. Not 0, so that an address of 0 is a mistake; a multiple of 1024, so that a
    // swizzle by address bits and one by offsets are the same.
    static constexpr uint32_t kFirstAddress = 1024;

    SharedMemory() = default;
    SharedMemory(const SharedMemory&) = delete;
    SharedMemory& operator=(const SharedMemory&) = delete;
    ~SharedMemory();

    void allocate(int bytes);
    void begin_block(uint16_t poison);  // all of it: NaN in every type
    // The distance from the first byte at which something was written outside, 0 when nothing was.
    int64_t find_overrun() const;

    char* data() const { return data_; }
    int bytes() const { return bytes_; }
    bool contains(const void* p) const {
        const char* at = static_cast<const char*>(p);
        return at >= data_ && at < data_ + bytes_;
    }
    bool contains(uint32_t address, int64_t bytes) const {
        return address >= kFirstAddress && address - kFirstAddress + bytes <= bytes_;
    }
    uint32_t address_of(const void* p) const {
        return static_cast<uint32_t>(static_cast<const char*>(p) - data_) + kFirstAddress;
    }
    char* at(uint32_t address) const { return data_ + (address - kFirstAddress); }

    // The asynchronous proxy (TMA, wgmma) sees plain writes only once a fence has published them. Here each fence
    // copies all that there is into an image; what differs from the image was written without one, or is being written
    // right now.
    void publish();
    // Whether the proxy sees these bytes as they are.
    bool is_published(uint32_t address, int bytes);
    // After a write by the proxy itself.
    void publish(uint32_t address, int bytes);

  private:
    void begin_image();

    std::vector<char> memory_;
    std::vector<char> image_;
    uint16_t poison_ = 0;
    bool has_image_ = false;  // in this block: a kernel without TMA and wgmma needs none
    char* data_ = nullptr;
    int bytes_ = 0;
};

}  // namespace tf::emulator
