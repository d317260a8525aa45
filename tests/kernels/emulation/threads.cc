// Fibers of a block, turns of blocks, and what threads do together.
#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <thread>

#include "runtime.h"

namespace emulation {

namespace {

constexpr int kGarbage = 0xA5;
constexpr int kMaxWaits = 10000;
constexpr unsigned kTurnsOneIn = 64;    // accesses between blocks

thread_local Block* block_of_this_thread = nullptr;

void begin_thread() {
    Block& block = this_block();
    block.launch.enter(block.launch.request.arguments);
    Thread& thread = this_thread();
    if (!thread.open.empty() || !thread.groups.empty()) fail("ends while its copies are under way");
    thread.state = State::kDone;
    block.give_way();
}

}  // namespace

Block& this_block() { return *block_of_this_thread; }
Thread& this_thread() { return *block_of_this_thread->current; }

Launch::Launch(const Request& request, Enter enter, DynamicShared dynamic_shared)
    : request(request), enter(enter), dynamic_shared(dynamic_shared), random_state(request.seed * 2 + 1) {
    const int blocks = request.grid[0] * request.grid[1] * request.grid[2];
    for (int i = 0; i < blocks; ++i) running.push_back(i);
    turn = random(blocks);
}

unsigned Launch::random(unsigned below) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (random_state >> 33) % below;
}

void Launch::begin(int block) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return turn == block; });
}

void Launch::pass_turn(int block, bool ends) {
    std::unique_lock<std::mutex> lock(mutex);
    if (ends) {
        for (size_t i = 0; i < running.size(); ++i)
            if (running[i] == block) running.erase(running.begin() + i);
        if (running.empty()) return;
    }
    turn = running[random(running.size())];
    if (turn == block) return;
    changed.notify_all();
    if (!ends) changed.wait(lock, [&] { return turn == block; });
}

Block::Block(Launch& launch, int number) : launch(launch), number(number) {
    const Request& request = launch.request;
    const unsigned x = request.grid[0], y = request.grid[1];
    index = {number % x, number / x % y, number / (x * y)};
    threads.resize(request.threads);
    stacks.reset(new uint8_t[request.threads * kStackBytes]);
    for (int i = 0; i < request.threads; ++i) {
        threads[i].number = i;
        threads[i].stack = stacks.get() + i * kStackBytes;
        getcontext(&threads[i].context);
        threads[i].context.uc_stack.ss_sp = threads[i].stack;
        threads[i].context.uc_stack.ss_size = kStackBytes;
        threads[i].context.uc_link = nullptr;
        makecontext(&threads[i].context, begin_thread, 0);
    }
}

// The C library knows where the thread_local variables of this library are; the kernel's are among them.
void Block::find_shared_memory() {
    dynamic_shared = launch.dynamic_shared();
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Block& block = *static_cast<Block*>(data);
            uint8_t* begin = static_cast<uint8_t*>(info->dlpi_tls_data);
            for (int i = 0; begin != nullptr && i < info->dlpi_phnum; ++i) {
                const auto& segment = info->dlpi_phdr[i];
                if (segment.p_type != PT_TLS || block.dynamic_shared < begin ||
                    block.dynamic_shared >= begin + segment.p_memsz)
                    continue;
                block.variables = begin;
                block.variable_bytes = segment.p_memsz;
            }
            return 0;
        },
        this);
    memset(variables, kGarbage, variable_bytes);
    bytes.assign(variable_bytes, Byte());
    block_of_this_thread = this;    // one of the variables
}

void Block::resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.started) _longjmp(thread.place, 1);
    thread.started = true;
    setcontext(&thread.context);
}

void Block::give_way() {
    if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void Block::report(const std::string& problem) {
    if (launch.problem.empty()) launch.problem = "block " + std::to_string(number) + ": " + problem;
}

bool Block::run_warp(Thread* lanes, int count) {
    for (bool runs = true; runs;) {
        runs = false;
        for (int i = 0; i < count; ++i) {
            if (lanes[i].state != State::kReady) continue;
            runs = true;
            resume(lanes[i]);
            if (gives_turn) launch.pass_turn(number, false);
            gives_turn = false;
            if (!launch.problem.empty()) return false;
        }
    }
    for (int i = 0; i < count; ++i)
        if (lanes[i].state == State::kAtWarp) {
            report("thread " + std::to_string(lanes[i].number) + " waits at " + lanes[i].instruction +
                   ", to which other lanes of its warp do not come");
            return false;
        }
    return true;
}

void Block::run() {
    launch.begin(number);
    find_shared_memory();
    const int warps = (static_cast<int>(threads.size()) + kLanes - 1) / kLanes;
    std::vector<int> order(warps);
    for (int i = 0; i < warps; ++i) order[i] = i;
    for (bool ends = !launch.problem.empty(); !ends;) {
        for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[launch.random(i + 1)]);
        for (int warp : order) {
            const int first = warp * kLanes, left = static_cast<int>(threads.size()) - first;
            if (!run_warp(&threads[first], left < kLanes ? left : kLanes)) break;
        }
        if (!launch.problem.empty()) break;
        ends = true;
        for (Thread& thread : threads)
            if (thread.state == State::kAtBlock) thread.state = State::kReady, ends = false;
        ++phase;
        launch.waited = 0;
        if (!ends) launch.pass_turn(number, false);
        if (!launch.problem.empty()) break;
    }
    launch.pass_turn(number, true);
}

Index thread_index() { return {this_thread().number, 0, 0}; }
Index block_index() { return this_block().index; }
Index block_size() { return {static_cast<unsigned>(this_block().launch.request.threads), 1, 1}; }
Index grid_size() {
    const int32_t(&grid)[3] = this_block().launch.request.grid;
    return {static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]), static_cast<unsigned>(grid[2])};
}

void fail(const char* format, ...) {
    Block& block = this_block();
    if (block.launch.problem.empty()) {
        char text[512];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        block.launch.problem =
            "block " + std::to_string(block.number) + ", thread " + std::to_string(this_thread().number) + " " + text;
    }
    _longjmp(block.scheduler, 1);
}

void meet_warp(const char* instruction, Together together, void* mine) {
    Block& block = this_block();
    Thread& thread = this_thread();
    Thread* lanes = &block.threads[thread.number / kLanes * kLanes];
    thread.instruction = instruction;
    thread.arguments = mine;
    void* all[kLanes];
    for (int i = 0; i < kLanes; ++i) {
        if (&lanes[i] != &thread && lanes[i].state != State::kAtWarp) {
            thread.state = State::kAtWarp;
            block.give_way();
            return;
        }
        if (lanes[i].instruction != instruction)
            fail("is at %s and thread %u of its warp at %s", instruction, lanes[i].number, lanes[i].instruction);
        all[i] = lanes[i].arguments;
    }
    together(all);
    for (int i = 0; i < kLanes; ++i) lanes[i].state = State::kReady;
}

void meet_block() {
    this_thread().state = State::kAtBlock;
    this_block().give_way();
}

void give_turn(bool waits) {
    Block& block = this_block();
    if (waits) {
        if (++block.launch.waited > kMaxWaits) fail("waits for other blocks for ever");
    } else {
        block.launch.waited = 0;
        if (block.launch.random(kTurnsOneIn) != 0) return;
    }
    block.gives_turn = true;
    block.give_way();
}

int run(const Request& request, Enter enter, DynamicShared dynamic_shared, char* message, int message_bytes) {
    Launch launch(request, enter, dynamic_shared);
    std::vector<std::thread> workers;
    for (size_t i = 0, blocks = launch.running.size(); i < blocks; ++i)
        workers.emplace_back([&launch, i] { std::make_unique<Block>(launch, static_cast<int>(i))->run(); });
    for (std::thread& worker : workers) worker.join();
    snprintf(message, message_bytes, "%s", launch.problem.c_str());
    return launch.problem.empty() ? 0 : 1;
}

}  // namespace emulation
