"""Every interleaving of the scheduler's lock-free protocols, in small.

The protocols of docs/scheduler-protocol.md are written out again as generators of single memory
accesses, and `explore` runs them in every order, with stores delayed as x86-64 delays them: each
thread has a first-in first-out buffer that empties into memory at any later time. Loads look into
the thread's own buffer first; read-modify-writes, fences and sequentially consistent stores wait
until it is empty. Reorderings that only weaker machines do are not explored.

Each test also breaks the protocol in the ways that its steps are there to prevent, and expects to
be told.
"""

import functools

import pytest

SLOTS = 2


class BrokenError(Exception):
    """Some interleaving violates what the protocol promises."""


def explore(memory, programs, check):
    """Run `programs` in every order; return the number of states.

    A program is a generator function without arguments. It yields accesses, receives their results
    and returns its outcome. ``check(memory, outcomes)`` tells whether an end is right. To be stuck
    before the end never is.
    """
    names = sorted(memory)

    @functools.cache
    def resume(thread, results):
        """Return the next access of a thread that has received `results`, or its outcome."""
        program = programs[thread]()
        try:
            access = next(program)
            for result in results:
                access = program.send(result)
        except StopIteration as end:
            return None, end.value
        return access, None

    def moves(state):
        values, buffers, histories = state
        for thread, (buffer, results) in enumerate(zip(buffers, histories, strict=True)):

            def after(values=values, buffer=buffer, results=results, thread=thread):
                return (
                    values,
                    (*buffers[:thread], buffer, *buffers[thread + 1 :]),
                    (*histories[:thread], results, *histories[thread + 1 :]),
                )

            def written(name, value, values=values):
                place = names.index(name)
                return (*values[:place], value, *values[place + 1 :])

            if buffer:
                yield after(values=written(*buffer[0]), buffer=buffer[1:])
            access, _ = resume(thread, results)
            if access is None:
                continue
            kind, name, *operands = access
            if kind == "load":
                seen_by_thread = dict(zip(names, values, strict=True)) | dict(buffer)
                yield after(results=(*results, seen_by_thread[name]))
            elif kind == "store":
                yield after(buffer=(*buffer, (name, *operands)), results=(*results, None))
            elif not buffer:
                old = values[names.index(name)] if name else None
                if kind == "fence":
                    yield after(results=(*results, None))
                elif kind == "exchange":
                    yield after(values=written(name, operands[0]), results=(*results, old))
                elif kind == "add":
                    yield after(values=written(name, old + operands[0]), results=(*results, old))
                elif kind == "swap_if":
                    expected, new = operands
                    values_then = written(name, new) if old == expected else values
                    yield after(values=values_then, results=(*results, old == expected))
                elif kind == "wait" and old:
                    yield after(values=written(name, 0), results=(*results, None))

    start = (
        tuple(memory[name] for name in names),
        ((),) * len(programs),
        ((),) * len(programs),
    )
    seen = {start}
    stack = [start]
    while stack:
        state = stack.pop()
        nexts = list(moves(state))
        if not nexts:
            ends = [resume(thread, results) for thread, results in enumerate(state[2])]
            final = dict(zip(names, state[0], strict=True))
            if any(access is not None for access, _ in ends):
                raise BrokenError(f"stuck with {final}")
            if not check(final, [outcome for _, outcome in ends]):
                raise BrokenError(f"ended with {final} and {[end[1] for end in ends]}")
        for following in nexts:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return len(seen)


# The deque: see speechrnt/_deque.pxd.


def push(item, without=""):
    bottom = yield "load", "bottom"
    top = yield "load", "top"
    if bottom - top >= SLOTS and without != "room":
        return False
    if without == "order":
        yield "store", "bottom", bottom + 1
        yield "store", f"slot{bottom % SLOTS}", item
    else:
        yield "store", f"slot{bottom % SLOTS}", item
        yield "store", "bottom", bottom + 1
    return True


def take(without=""):
    while True:
        top = yield "load", "top"
        bottom = yield "load", "bottom"
        if top >= bottom:
            return None
        item = yield "load", f"slot{top % SLOTS}"
        if without == "exchange":
            yield "store", "top", top + 1
            return item
        if (yield "swap_if", "top", top, top + 1):
            return item


def pop(without=""):
    bottom = (yield "load", "bottom") - 1
    yield "store" if without == "total order" else "exchange", "bottom", bottom
    top = yield "load", "top"
    item = None
    if top < bottom:
        return (yield "load", f"slot{bottom % SLOTS}")
    if top == bottom:
        item = yield "load", f"slot{bottom % SLOTS}"
        if without != "last exchange" and not (yield "swap_if", "top", top, top + 1):
            item = None
    yield "store", "bottom", bottom + 1
    return item


def owner(script, without=""):
    """Do a script: "+" pushes 1, 2, ... , "-" pops and "<" takes; return what left and entered."""

    def program():
        left, entered, item = [], [], 0
        for action in script:
            if action == "+":
                item += 1
                if (yield from push(item, without)):
                    entered.append(item)
            else:
                left.append((yield from (pop if action == "-" else take)(without)))
        return left, entered

    return program


def thief(count, without=""):
    def program():
        left = []
        for _ in range(count):
            left.append((yield from take(without)))
        return left, []

    return program


def each_item_left_once(memory, outcomes):
    left = [item for taken, _ in outcomes for item in taken if item is not None]
    entered = [item for _, pushed in outcomes for item in pushed]
    rest = [memory[f"slot{place % SLOTS}"] for place in range(memory["top"], memory["bottom"])]
    return sorted(left + rest) == entered


DEQUE = {"top": 0, "bottom": 0, "slot0": 0, "slot1": 0}
DEQUE_SCRIPTS = [("++--", 2, 1), ("+-+-", 1, 2), ("++<+-", 2, 1), ("+++-<", 1, 2), ("+<+<+", 2, 1)]


@pytest.mark.parametrize(("script", "takes", "thieves"), DEQUE_SCRIPTS)
def test_deque(script, takes, thieves):
    programs = [owner(script)] + [thief(takes)] * thieves
    assert explore(DEQUE, programs, each_item_left_once) > 100


@pytest.mark.parametrize(
    ("without", "script"),
    [
        ("room", "+++"),
        ("order", "++"),
        ("exchange", "+<"),
        ("total order", "++--"),
        ("last exchange", "+-"),
    ],
)
def test_broken_deque(without, script):
    with pytest.raises(BrokenError):
        explore(DEQUE, [owner(script, without), thief(2, without)], each_item_left_once)


# Parking: see idle_announce, idle_retract and idle_choose in speechrnt/_park.pxd.


def wake(without=""):
    if without != "waker's fence":
        yield "fence", None
    if (yield "load", "idle") and (yield "exchange", "idle", 0):
        yield "exchange", "semaphore", 1


def submitter(tasks, without=""):
    def program():
        for _ in range(tasks):
            queued = yield "load", "queued"
            yield "store", "queued", queued + 1
            yield from wake(without)

    return program


def worker(tasks, without=""):
    """Run that many tasks."""

    def program():
        done = 0
        while done < tasks:
            if (yield "load", "queued") > done:
                done += 1
                continue
            if without == "sleeper's fence":
                yield "store", "idle", 1
            else:
                yield "exchange", "idle", 1
            seen = without != "second look" and (yield "load", "queued") > done
            if seen and ((yield "exchange", "idle", 0) or without == "owed post"):
                continue
            yield "wait", "semaphore"

    return program


PARKING = {"queued": 0, "idle": 0, "semaphore": 0}


def no_post_is_left(memory, outcomes):
    return memory["semaphore"] == 0


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_parking(tasks):
    assert explore(PARKING, [submitter(tasks), worker(tasks)], no_post_is_left) > 10


@pytest.mark.parametrize(
    "without", ["waker's fence", "sleeper's fence", "second look", "owed post"]
)
def test_broken_parking(without):
    with pytest.raises(BrokenError):
        explore(PARKING, [submitter(2, without), worker(2, without)], no_post_is_left)


# Searching: see search, wake_after_search and wake_for in speechrnt/_sched_core.pyx. One worker is
# about to end its search, during which nobody is woken; another one sleeps, or is about to. Two
# tasks are submitted, and each worker runs one of them for ever.


def found_task():
    for task in ("task1", "task2"):
        if (yield "load", task) and (yield "exchange", task, 0):
            return True
    return False


def sees_task():
    return (yield "load", "task1") or (yield "load", "task2")


def wake_unless_searching(without=""):
    if without != "submitter's fence":
        yield "fence", None
    if (yield "load", "searching"):
        return
    for worker in "ab":
        if (yield "load", f"idle {worker}") and (yield "exchange", f"idle {worker}", 0):
            yield "exchange", f"semaphore {worker}", 1
            return


def searching_submitter(task, without):
    def program():
        yield "store", task, 1
        yield from wake_unless_searching(without)

    return program


def sleeper(worker, without, searches):
    def program():
        if searches:
            yield "add", "searching", -1
            if (yield from found_task()):
                if without != "look after the search" and (yield from sees_task()):
                    yield from wake_unless_searching()
                return
        while not (yield from found_task()):
            yield "exchange", f"idle {worker}", 1
            if (yield from sees_task()) and (yield "exchange", f"idle {worker}", 0):
                continue
            yield "wait", f"semaphore {worker}"

    return program


@pytest.mark.parametrize("without", ["", "submitter's fence", "look after the search"])
def test_who_searches_wakes(without):
    programs = [
        searching_submitter("task1", without),
        searching_submitter("task2", without),
        sleeper("a", without, searches=True),
        sleeper("b", without, searches=False),
    ]
    names = [f"{kind} {worker}" for kind in ("idle", "semaphore") for worker in "ab"]
    memory = dict.fromkeys([*names, "task1", "task2"], 0) | {"searching": 1}
    if without:
        with pytest.raises(BrokenError, match="stuck"):
            explore(memory, programs, lambda *_: True)
    else:
        assert explore(memory, programs, lambda *_: True) > 1000


# Submission: see admit, push_stack and flush in speechrnt/_sched_core.pyx. A task is its number,
# and the task below it on the stack is in next<number>.


def push_task(task, without=""):
    while True:
        top = yield "load", "stack"
        yield "store", f"next{task}", top
        if without == "exchange of the top":
            yield "exchange", "stack", task
            return
        if (yield "swap_if", "stack", top, task):
            return


def flush(without=""):
    """Return what is on the stack, the oldest first; the list, of which only the length is shared,
    grows by it."""
    if not (yield "load", "stack"):
        return []
    if without != "length first":
        yield "store", "length", 1
    task = yield "load" if without == "exchange for none" else "exchange", "stack", 0
    if without == "exchange for none":
        yield "store", "stack", 0
    flushed = []
    while task:
        flushed.insert(0, task)
        task = yield "load", f"next{task}"
    yield "store", "length", len(flushed)
    return flushed


def stack_submitter(*tasks, without=""):
    def program():
        for task in tasks:
            yield from push_task(task, without)
        return []

    return program


def taker(flushes, without=""):
    def program():
        taken = []
        for _ in range(flushes):
            taken += yield from flush(without)
        return taken

    return program


STACK = {"stack": 0, "length": 0} | {f"next{task}": 0 for task in (1, 2, 3)}


def each_task_is_taken_in_order(memory, outcomes):
    taken, rest, task = outcomes[-1], [], memory["stack"]
    while task:
        rest.insert(0, task)
        task = memory[f"next{task}"]
    order = taken + rest
    return sorted(order) == [1, 2, 3] and order.index(1) < order.index(2)


@pytest.mark.parametrize("without", ["", "exchange of the top", "exchange for none"])
def test_submission_order(without):
    programs = [
        stack_submitter(1, 2, without=without),
        stack_submitter(3, without=without),
        taker(2, without),
    ]
    if without:
        with pytest.raises(BrokenError):
            explore(STACK, programs, each_task_is_taken_in_order)
    else:
        assert explore(STACK, programs, each_task_is_taken_in_order) > 1000


@pytest.mark.parametrize("without", ["", "length first", "stack first"])
def test_a_queue_never_looks_empty(without):
    """One submits, one moves the task to the list and leaves it there, one looks and sleeps."""

    def submitter():
        yield from push_task(1)
        yield from wake()

    def looker():
        while True:
            yield "exchange", "idle", 1
            looks = ["length", "stack"] if without == "stack first" else ["stack", "length"]
            if (yield "load", looks[0]) or (yield "load", looks[1]):
                return
            yield "wait", "semaphore"

    programs = [submitter, looker, taker(1, without)]
    memory = STACK | {"idle": 0, "semaphore": 0}
    if without:
        with pytest.raises(BrokenError, match="stuck"):
            explore(memory, programs, lambda *_: True)
    else:
        assert explore(memory, programs, lambda *_: True) > 100


def admit(limit, without=""):
    """Accept a task, unless closed or `limit` wait."""
    while True:
        admitted = yield "load", "admitted"
        if without == "closed bit":
            if (yield "load", "draining"):
                return False
        elif admitted & 1:
            return False
        taken = yield "load", "taken"
        if admitted // 2 - taken >= limit:
            return False
        if without == "exchange":
            yield "store", "admitted", admitted + 2
            return True
        if (yield "swap_if", "admitted", admitted, admitted + 2):
            return True


@pytest.mark.parametrize("without", ["", "exchange"])
def test_bound(without):
    def submitter():
        return 1 if (yield from admit(2, without)) else 0

    def taker():
        if (yield "load", "admitted") >= 2:
            yield "add", "taken", 1

    def within_bound(memory, outcomes):
        accepted = sum(outcomes[:3])
        # Who was refused saw two; with nothing taken, two were accepted.
        return accepted - memory["taken"] <= 2 <= accepted and memory["admitted"] == 2 * accepted

    programs = [submitter] * 3 + [taker]
    memory = {"admitted": 0, "taken": 0, "draining": 0}
    if without:
        with pytest.raises(BrokenError):
            explore(memory, programs, within_bound)
    else:
        assert explore(memory, programs, within_bound) > 100


@pytest.mark.parametrize("without", ["", "closed bit", "state first"])
def test_it_stops_only_when_all_is_done(without):
    def announce_quiet():
        if without != "state first":
            draining = yield "load", "draining"
        done = yield "load", "taken"
        admitted = yield "load", "admitted"
        if without == "state first":
            draining = yield "load", "draining"
        if draining and done == admitted // 2:
            yield "exchange", "stopped", 1

    def submitter():
        if (yield from admit(9, without)):
            yield "exchange", "stack", 1

    def shut_down():
        if without != "closed bit":
            yield "add", "admitted", 1
        yield "exchange", "draining", 1
        yield from announce_quiet()

    def worker():
        for _ in range(2):
            if (yield "load", "stopped"):
                return
            if (yield "exchange", "stack", 0):
                yield "add", "taken", 1
            yield "fence", None
            yield from announce_quiet()

    def all_done(memory, outcomes):
        return not memory["stopped"] or memory["taken"] == memory["admitted"] // 2

    memory = dict.fromkeys(["admitted", "taken", "stack", "draining", "stopped"], 0)
    programs = [submitter, shut_down, worker]
    if without:
        with pytest.raises(BrokenError):
            explore(memory, programs, all_done)
    else:
        assert explore(memory, programs, all_done) > 100


# The last two workers to finish: see announce_quiet in speechrnt/_sched_core.pyx.


def finisher(own, other, without=""):
    def program():
        yield "store", own, 1
        if without != "fence":
            yield "fence", None
        if (yield "load", other):
            yield "store", "quiet", 1

    return program


@pytest.mark.parametrize("without", ["", "fence"])
def test_somebody_sees_the_end(without):
    programs = [finisher("a", "b", without), finisher("b", "a", without)]

    def check(memory, outcomes):
        return memory["quiet"] == 1

    if without:
        with pytest.raises(BrokenError):
            explore({"a": 0, "b": 0, "quiet": 0}, programs, check)
    else:
        explore({"a": 0, "b": 0, "quiet": 0}, programs, check)


# The gate: see wake_for_gated and gate_wait in speechrnt/_sched_core.pyx. One worker is entering
# and takes what it then finds; a submitter wakes nobody if it sees that somebody is entering.


def entering():
    yield "add", "waiters", -1
    return (yield "load", "queued")


def gated_submitter(without):
    def program():
        yield "store", "queued", 1
        if without != "fence":
            yield "fence", None
        if (yield "load", "waiters") == 0:
            return 1
        return 0

    return program


@pytest.mark.parametrize("without", ["", "fence"])
def test_gated_task_is_noticed(without):
    programs = [entering, gated_submitter(without)]

    def check(memory, outcomes):
        return any(outcomes)

    if without:
        with pytest.raises(BrokenError):
            explore({"queued": 0, "waiters": 1}, programs, check)
    else:
        explore({"queued": 0, "waiters": 1}, programs, check)
