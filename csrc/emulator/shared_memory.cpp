#include "emulator/shared_memory.h"

#include <cstring>

#include "emulator/fiber.h"

#if defined(TF_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace tf::emulator {

namespace {

constexpr int kGuardBytes = 4096;
// NaN in every type: what is read beyond the end shows in the results.
constexpr int kPoison = 0xff;

void fill(char* target, int bytes, uint16_t poison) {
    for (int i = 0; i < bytes; ++i) target[i] = static_cast<char>(poison >> (i % 2 * 8));
}

}  // namespace

SharedMemory::~SharedMemory() {
#if defined(TF_EMULATOR_ASAN)
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
#endif
}

void SharedMemory::allocate(int bytes) {
    constexpr size_t kAlignment = 1024;
#if defined(TF_EMULATOR_ASAN)
    __asan_unpoison_memory_region(memory_.data(), memory_.size());
#endif
    memory_.resize(static_cast<size_t>(bytes) + 2 * kGuardBytes + kAlignment);
    const auto start = reinterpret_cast<uintptr_t>(memory_.data()) + kGuardBytes;
    data_ = reinterpret_cast<char*>((start + kAlignment - 1) / kAlignment * kAlignment);
    bytes_ = bytes;
    std::memset(data_ - kGuardBytes, kPoison, kGuardBytes);
    std::memset(data_ + bytes_, kPoison, kGuardBytes);
#if defined(TF_EMULATOR_ASAN)
    __asan_poison_memory_region(data_ - kGuardBytes, kGuardBytes);
    __asan_poison_memory_region(data_ + bytes_, kGuardBytes);
#endif
}

void SharedMemory::begin_block(uint16_t poison) {
    poison_ = poison;
    fill(data_, bytes_, poison);
    has_image_ = false;
}

int64_t SharedMemory::find_overrun() const {
#if !defined(TF_EMULATOR_ASAN)
    for (int i = 1; i <= kGuardBytes; ++i) {
        if (data_[-i] != static_cast<char>(kPoison)) return -i;
    }
    for (int i = 0; i < kGuardBytes; ++i) {
        if (data_[bytes_ + i] != static_cast<char>(kPoison)) return bytes_ + i;
    }
#endif
    return 0;
}

void SharedMemory::begin_image() {
    if (has_image_) return;
    has_image_ = true;
    image_.resize(static_cast<size_t>(bytes_));
    fill(image_.data(), bytes_, poison_);
}

void SharedMemory::publish() {
    has_image_ = true;
    image_.resize(static_cast<size_t>(bytes_));
    std::memcpy(image_.data(), data_, static_cast<size_t>(bytes_));
}

void SharedMemory::publish(uint32_t address, int bytes) {
    begin_image();
    std::memcpy(image_.data() + (address - kFirstAddress), at(address), static_cast<size_t>(bytes));
}

bool SharedMemory::is_published(uint32_t address, int bytes) {
    begin_image();
    return std::memcmp(image_.data() + (address - kFirstAddress), at(address), static_cast<size_t>(bytes)) == 0;
}

}  // namespace tf::emulator
