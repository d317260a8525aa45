// Launches, blocks and threads of the emulated device: shared by threads.cc, memory.cc and instructions.cc.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

namespace emulation {

struct Copy {
    uint8_t* to;
    const uint8_t* from;    // null for zeros
};

enum class State { kReady, kAtWarp, kAtBlock, kDone };

struct Thread {
    unsigned number;
    State state = State::kReady;
    bool started = false;
    jmp_buf place;
    ucontext_t context;
    uint8_t* stack;
    // What it waits with for its warp.
    const char* instruction = nullptr;
    void* arguments = nullptr;
    // cp.async: of the group that is open, and of committed groups.
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

// Who used a byte of shared memory in which phase (between two barriers of the block), as thread + 1; 0 is nobody.
struct Byte {
    uint32_t read_phase, write_phase, adder_phase;
    uint16_t reader, writer, adder;
    uint16_t copier;    // of a cp.async that is under way
};

// Blocks take turns: each has a thread of the operating system, of which one runs at a time.
struct Launch {
    const Request& request;
    Enter enter;
    DynamicShared dynamic_shared;
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<int> running;
    int turn = 0;
    int waited = 0;    // turns since anything but waiting happened
    uint64_t random_state;
    std::string problem;

    Launch(const Request& request, Enter enter, DynamicShared dynamic_shared);
    unsigned random(unsigned below);
    void begin(int block);
    void pass_turn(int block, bool ends);
};

struct Block {
    static constexpr size_t kStackBytes = 64 * 1024;

    Launch& launch;
    Index index;
    int number;
    std::vector<Thread> threads;
    Thread* current = nullptr;
    jmp_buf scheduler;
    bool gives_turn = false;
    uint32_t phase = 1;
    std::unique_ptr<uint8_t[]> stacks;    // not cleared: most of it is never touched
    // Shared memory, dynamic and static: variables of this thread of the operating system.
    uint8_t* variables = nullptr;
    size_t variable_bytes = 0;
    uint8_t* dynamic_shared = nullptr;
    std::vector<Byte> bytes;

    Block(Launch& launch, int number);
    void run();
    void give_way();    // from the current thread back to the scheduler

private:
    void find_shared_memory();
    void resume(Thread& thread);
    bool run_warp(Thread* lanes, int count);    // until none can go on; false when the launch failed
    void report(const std::string& problem);
};

Block& this_block();
Thread& this_thread();

}  // namespace emulation
