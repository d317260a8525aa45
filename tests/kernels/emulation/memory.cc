// What accesses are checked for: that they are aligned and inside a buffer of the launch or shared memory, and that
// threads that use the same byte of shared memory have a barrier in between. cp.async is done no sooner than its thread
// waits for it, and until then nobody may use where it goes to.
//
// Kernels are compiled with -fsanitize=thread,alignment,bounds but linked without these libraries: the calls that the
// compiler puts before every access come here.
#include <cstring>

#include "runtime.h"

namespace emulation {

namespace {

constexpr uint32_t kSharedBase = 384;    // dynamic shared memory is aligned, but does not begin at 0
constexpr uint16_t kSeveral = 0xFFFF;
constexpr int kCopyBytes = 16;

const char* name_of(Access access) {
    return access == Access::kRead ? "reads" : access == Access::kWrite ? "writes" : "adds to";
}

// The thread (+ 1) whose use of the byte in this phase a barrier should separate from `access` of thread `mine` (+ 1).
uint16_t rival(const Byte& byte, uint32_t phase, uint16_t mine, Access access) {
    if (byte.write_phase == phase && byte.writer != mine) return byte.writer;
    if (access == Access::kRead) return byte.adder != mine && byte.adder_phase == phase ? byte.adder : 0;
    if (byte.read_phase == phase && byte.reader != mine) return byte.reader;
    return access == Access::kWrite && byte.adder_phase == phase && byte.adder != mine ? byte.adder : 0;
}

void mark(uint32_t& when, uint16_t& who, uint32_t phase, uint16_t mine) {
    who = when == phase && who != mine ? kSeveral : mine;
    when = phase;
}

bool is_shared(const uint8_t* at) {
    const Block& block = this_block();
    return at >= block.variables && at < block.variables + block.variable_bytes;
}

void use_shared(const uint8_t* at, int size, Access access) {
    Block& block = this_block();
    const uint16_t mine = this_thread().number + 1;
    const ptrdiff_t place = at - block.dynamic_shared;
    const bool is_dynamic = place >= 0 && place < kMaxSharedBytes;
    if (is_dynamic && place + size > block.launch.request.shared_bytes)
        fail("%s %d bytes at byte %td of shared memory, which has %d", name_of(access), size, place,
             block.launch.request.shared_bytes);
    for (int i = 0; i < size; ++i) {
        Byte& byte = block.bytes[at - block.variables + i];
        if (byte.copier)
            fail("%s byte %td of shared memory, to which a cp.async of thread %d is under way", name_of(access),
                 place + i, byte.copier - 1);
        if (const uint16_t other = rival(byte, block.phase, mine, access)) {
            const std::string who = other == kSeveral ? "several threads" : "thread " + std::to_string(other - 1);
            fail("%s byte %td of %s shared memory, which %s used since the last barrier", name_of(access),
                 is_dynamic ? place + i : at - block.variables + i, is_dynamic ? "dynamic" : "static", who.c_str());
        }
        if (access == Access::kRead) mark(byte.read_phase, byte.reader, block.phase, mine);
        if (access == Access::kWrite) mark(byte.write_phase, byte.writer, block.phase, mine);
        if (access == Access::kAtomic) mark(byte.adder_phase, byte.adder, block.phase, mine);
    }
}

void use_global(const uint8_t* at, int size, Access access) {
    const Request& request = this_block().launch.request;
    const Buffer* nearest = nullptr;
    int64_t distance = 0;
    for (int i = 0; i < request.num_buffers; ++i) {
        const Buffer& buffer = request.buffers[i];
        const int64_t before = buffer.begin - at, after = at + size - (buffer.begin + buffer.bytes);
        const int64_t outside = before > after ? before : after;
        if (outside <= 0) {
            if (access != Access::kRead && !buffer.writable)
                fail("%s %d bytes at byte %td of %s, an input", name_of(access), size, at - buffer.begin, buffer.name);
            return;
        }
        if (nearest == nullptr || outside < distance) nearest = &buffer, distance = outside;
    }
    if (nearest == nullptr) fail("%s %d bytes at %p, and there are no buffers", name_of(access), size, at);
    fail("%s %d bytes at byte %td of %s, which has %lld", name_of(access), size, at - nearest->begin, nearest->name,
         static_cast<long long>(nearest->bytes));
}

void check_aligned(const char* instruction, uint64_t address, int size) {
    if (address % size) fail("gives %s an address that is %llu past a multiple of %d", instruction,
                             static_cast<unsigned long long>(address % size), size);
}

void finish(const std::vector<Copy>& group) {
    Block& block = this_block();
    for (const Copy& copy : group) {
        for (int i = 0; i < kCopyBytes; ++i) block.bytes[copy.to - block.variables + i].copier = 0;
        use_shared(copy.to, kCopyBytes, Access::kWrite);
        if (copy.from)
            memcpy(copy.to, copy.from, kCopyBytes);
        else
            memset(copy.to, 0, kCopyBytes);
    }
}

}  // namespace

void check(const void* pointer, int size, Access access) {
    const uint8_t* at = static_cast<const uint8_t*>(pointer);
    const uint8_t* stack = this_thread().stack;
    if (at >= stack && at < stack + Block::kStackBytes) return;
    if (is_shared(at))
        use_shared(at, size, access);
    else
        use_global(at, size, access);
}

uint32_t shared_address(const void* pointer) {
    return kSharedBase + static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - this_block().dynamic_shared);
}

uint8_t* shared_memory(const char* instruction, uint32_t address, int size, Access access) {
    check_aligned(instruction, address, size);
    const uint32_t place = address - kSharedBase, room = this_block().launch.request.shared_bytes;
    if (place >= room) fail("gives %s byte %u of shared memory, which has %u", instruction, place, room);
    uint8_t* at = this_block().dynamic_shared + place;
    use_shared(at, size, access);
    return at;
}

void copy_async(uint32_t shared, const void* global, bool valid) {
    const uint8_t* from = static_cast<const uint8_t*>(global);
    check_aligned("cp.async", reinterpret_cast<uintptr_t>(global), kCopyBytes);
    if (valid) use_global(from, kCopyBytes, Access::kRead);
    uint8_t* to = shared_memory("cp.async", shared, kCopyBytes, Access::kWrite);
    Block& block = this_block();
    for (int i = 0; i < kCopyBytes; ++i) block.bytes[to - block.variables + i].copier = this_thread().number + 1;
    this_thread().open.push_back({to, valid ? from : nullptr});
}

void commit_copies() {
    Thread& thread = this_thread();
    thread.groups.push_back(std::move(thread.open));
    thread.open.clear();
}

void wait_for_copies(int pending) {
    std::deque<std::vector<Copy>>& groups = this_thread().groups;
    for (; static_cast<int>(groups.size()) > pending; groups.pop_front()) finish(groups.front());
}

}  // namespace emulation

// What the compiler calls.
using emulation::Access;
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESS(size)                                                                              \
    void __tsan_read##size(void* at) { emulation::check(at, size, Access::kRead); }               \
    void __tsan_write##size(void* at) { emulation::check(at, size, Access::kWrite); }             \
    void __tsan_unaligned_read##size(void* at) { emulation::check(at, size, Access::kRead); }     \
    void __tsan_unaligned_write##size(void* at) { emulation::check(at, size, Access::kWrite); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS
void __tsan_read_range(void* at, size_t size) { emulation::check(at, static_cast<int>(size), Access::kRead); }
void __tsan_write_range(void* at, size_t size) { emulation::check(at, static_cast<int>(size), Access::kWrite); }
// add_atomically, which has checked it
int32_t __tsan_atomic32_load(const int32_t* at, int) { return *at; }
void __tsan_atomic32_store(int32_t* at, int32_t x, int) { *at = x; }

struct SourcePlace {
    const char* file;
    uint32_t line, column;
};
void __ubsan_handle_type_mismatch_v1(SourcePlace* place, void* at) {
    emulation::fail("uses %p at %s:%u, which is not aligned for its type", at, place->file, place->line);
}
void __ubsan_handle_out_of_bounds(SourcePlace* place, size_t index) {
    emulation::fail("takes element %zu at %s:%u, past the end of an array", index, place->file, place->line);
}
}
