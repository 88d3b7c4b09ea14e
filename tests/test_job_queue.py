"""Whose turn it is: rules one by one, and any history against an oracle without heaps."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechrnt import Priority
from speechrnt.job_queue import DEFAULT_SLACK_S, FAIR_PERIOD, ROUND_S, JobQueue

CRITICAL, HIGH, NORMAL, LOW = Priority


@dataclass(eq=False)
class Job:
    name: object = None
    key: object = "key"
    priority: Priority = NORMAL
    deadline: float | None = None
    client: object = None
    cost_s: float = 0.1
    n_windows: int = 1


def queue_of(jobs, now=0.0):
    queue = JobQueue()
    for job in jobs:
        queue.add(job, now)
    return queue


def drain(queue):
    return [queue.pick() for _ in range(len(queue))]


class Oracle:
    """The rules of the module's docstring, word by word, over a plain list."""

    def __init__(self):
        self.waiting = []  # (round, due, number, beginning, job)
        self.begun = dict.fromkeys(Priority, 0.0)
        self.ends = {}
        self.added = self.picks = 0

    def add(self, job, now):
        due = now + DEFAULT_SLACK_S if job.deadline is None else job.deadline
        begin = self.begun[job.priority]
        if job.client is not None:
            begin = max(begin, self.ends.get((job.priority, job.client), 0.0))
            self.ends[job.priority, job.client] = begin + job.cost_s
        self.added += 1
        self.waiting.append((begin // ROUND_S, due, self.added, begin, job))

    def best(self, jobs):
        return min(jobs, key=lambda entry: entry[:3], default=None)

    def take(self, entry):
        self.waiting.remove(entry)
        job = entry[-1]
        if not self.level(job.priority):
            self.ends = {who: end for who, end in self.ends.items() if who[0] != job.priority}
        return job

    def level(self, priority):
        return [entry for entry in self.waiting if entry[-1].priority == priority]

    def pick(self):
        if not self.waiting:
            return None
        order = list(Priority)
        if self.picks % FAIR_PERIOD == FAIR_PERIOD - 1:
            order.insert(0, Priority(self.picks // FAIR_PERIOD % len(Priority)))
        self.picks += 1
        entry = self.best(next(self.level(p) for p in order if self.level(p)))
        level = entry[-1].priority
        self.begun[level] = max(self.begun[level], entry[3])
        return self.take(entry)

    def pick_like(self, leader, room):
        for priority in Priority:
            if leader.priority == CRITICAL and priority > CRITICAL:
                return None
            alike = [entry for entry in self.level(priority) if entry[-1].key == leader.key]
            if alike:
                return self.take(self.best(alike))
            if self.level(priority) and priority < leader.priority:
                return None
        return None

    def discard(self, job):
        entries = [entry for entry in self.waiting if entry[-1] is job]
        return bool(entries) and bool(self.take(entries[0]))


jobs = st.builds(
    Job,
    key=st.sampled_from("abc"),
    priority=st.sampled_from(list(Priority)),
    deadline=st.sampled_from([None, 1.0, 5.0, 5.0, 50.0]),
    client=st.sampled_from([None, "x", "y", "z"]),
    cost_s=st.sampled_from([0.0, 0.25, 1.0, 4.0]),
)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), jobs),
        st.tuples(st.just("pick"), st.none()),
        st.tuples(st.just("like"), jobs),
        st.tuples(st.just("discard"), st.integers(0, 20)),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0])),
    ),
    max_size=80,
)


@settings(max_examples=400)
@given(actions=actions)
def test_any_history_is_that_of_the_oracle(actions):
    queue, oracle, now, added = JobQueue(), Oracle(), 0.0, []
    for action, value in actions:
        if action == "add":
            added.append(value)
            queue.add(value, now)
            oracle.add(value, now)
        elif action == "pick":
            assert queue.pick() is oracle.pick()
        elif action == "like":
            assert queue.pick_like(value, 1) is oracle.pick_like(value, 1)
        elif action == "discard" and added:
            job = added[value % len(added)]
            assert queue.discard(job) == oracle.discard(job)
        elif action == "wait":
            now += value
        waiting = [job for *_, job in oracle.waiting]
        assert len(queue) == len(waiting)
        assert set(map(id, queue)) == set(map(id, waiting))
        assert queue.sizes == {p: len(oracle.level(p)) for p in Priority}
        assert queue.cost_s == pytest.approx(sum(job.cost_s for job in waiting))
    while (job := queue.pick()) is not None:
        assert job is oracle.pick()
    assert not oracle.waiting
    assert queue.cost_s == 0


def test_an_empty_queue_has_nothing_to_pick():
    queue = JobQueue()
    assert queue.pick() is None
    assert queue.pick_like(Job(), 1) is None
    assert not queue.discard(Job())
    assert (len(queue), list(queue), queue.cost_s) == (0, [], 0)


def test_higher_levels_go_first():
    queue = queue_of([Job(priority=p) for p in (LOW, NORMAL, HIGH, CRITICAL)])
    assert [job.priority for job in drain(queue)] == [CRITICAL, HIGH, NORMAL, LOW]


def test_equal_jobs_go_in_the_order_in_which_they_came():
    queue = queue_of([Job(n, key=n % 3) for n in range(20)])
    assert [job.name for job in drain(queue)] == list(range(20))


def test_what_is_due_first_goes_first_and_jobs_without_deadline_are_due_in_a_while():
    late = Job("late", deadline=DEFAULT_SLACK_S + 1)
    queue = queue_of([late, Job("none"), Job("soon", deadline=1.0), Job("sooner", deadline=0.5)])
    assert [job.name for job in drain(queue)] == ["sooner", "soon", "none", "late"]


def test_a_deadline_does_not_help_across_levels():
    queue = queue_of([Job("due", deadline=0.1), Job("high", priority=HIGH)])
    assert [job.name for job in drain(queue)] == ["high", "due"]


@pytest.mark.parametrize("level", list(Priority))
def test_no_level_waits_for_more_picks_than_the_bound(level):
    queue = queue_of([Job(priority=level)])
    others = [p for p in Priority if p != level]
    bound = FAIR_PERIOD * len(Priority)
    for _ in range(5):
        waited = 0
        while True:
            for p in others:  # always something else to do
                if queue.sizes[p] < 2:
                    queue.add(Job(priority=p), 0.0)
            waited += 1
            assert waited <= bound
            if queue.pick().priority == level:
                break
        queue.add(Job(priority=level), 0.0)


def test_the_share_of_turns_for_others_is_one_in_the_fair_period():
    queue = queue_of([Job(priority=p) for p in Priority for _ in range(1000)])
    picked = Counter(queue.pick().priority for _ in range(FAIR_PERIOD * 40))
    assert picked[LOW] == picked[NORMAL] == picked[HIGH] == 10
    assert picked[CRITICAL] == FAIR_PERIOD * 40 - 30


def flood(deadline, light_deadline=None, n_light=3):
    """A flood of one client, then single jobs of light ones; return the places of those."""
    flooding = [Job(n, client="flood", deadline=deadline) for n in range(1000)]
    light = [Job(client=f"light{n}", deadline=light_deadline) for n in range(n_light)]
    order = drain(queue_of(flooding + light))
    return [order.index(job) for job in light]


# A round holds so many of the flood's jobs, and one of each light client.
PLACES = ROUND_S / 0.1 + 3


def test_a_flood_delays_others_by_a_round_only():
    assert max(flood(None)) <= PLACES


@pytest.mark.parametrize("light_deadline", [None, 1.0])
def test_a_flood_with_deadlines_delays_others_by_a_round_only(light_deadline):
    assert max(flood(deadline=0.001, light_deadline=light_deadline)) <= PLACES


def test_a_flood_that_goes_on_and_on_does_not_delay_others_more():
    queue = queue_of(Job(client=f"flood{n % 2}") for n in range(2000))
    for n in range(200):
        for _ in range(3):
            queue.pick()
        light = Job(client=f"light{n}")
        queue.add(light, now=float(n))
        place = 0
        while queue.pick() is not light:
            place += 1
        assert place <= 2 * ROUND_S / 0.1 + 1


@pytest.mark.parametrize("order", ["one after the other", "by turns"])
def test_clients_that_all_want_more_than_their_share_get_equal_shares(order):
    clients = [client for client in "aaaabbc" for _ in range(100)]
    if order == "by turns":
        clients = ["a", "b", "a", "c", "a", "b", "a"] * 100
    queue = queue_of(Job(client=client) for client in clients)
    first = Counter(queue.pick().client for _ in range(240))
    assert max(first.values()) - min(first.values()) <= 2 * ROUND_S / 0.1


def test_a_client_that_comes_later_gets_its_share_from_then_on():
    queue = queue_of(Job(client="early") for _ in range(500))
    for _ in range(100):
        queue.pick()
    for _ in range(200):
        queue.add(Job(client="later"), now=5.0)
    first = Counter(queue.pick().client for _ in range(200))
    assert abs(first["early"] - first["later"]) <= 2 * ROUND_S / 0.1


def test_shares_are_of_time_and_not_of_jobs():
    jobs = [Job(client="long", cost_s=1.0) for _ in range(200)]
    jobs += [Job(client="short", cost_s=0.1) for _ in range(200)]
    queue = queue_of(jobs)
    first = Counter(queue.pick().client for _ in range(110))
    assert first["short"] / first["long"] == pytest.approx(10, rel=0.3)


def test_a_client_that_asks_for_little_is_never_moved_back():
    queue = JobQueue()
    for n in range(100):
        queue.add(Job("light", client="light"), now=float(n))
        queue.add(Job("none"), now=float(n))
        assert [job.name for job in drain(queue)] == ["light", "none"]


def test_what_a_client_asks_for_at_one_level_costs_it_nothing_at_another():
    queue = queue_of(Job(client="a", priority=LOW) for _ in range(100))
    for client in "ba":
        queue.add(Job(client, client=client, deadline=1.0 if client == "a" else 2.0), now=0.0)
    assert [queue.pick().name for _ in range(2)] == ["a", "b"]


def test_inside_a_round_a_clients_later_job_with_a_deadline_goes_first():
    jobs = [Job("waits", client="a", cost_s=0.01), Job("due", 0, client="a", deadline=1.0)]
    assert queue_of(jobs).pick_like(Job(key=0), 1).name == "due"
    jobs = [Job("waits", client="a", cost_s=0.01), Job("due", client="a", deadline=1.0)]
    assert queue_of(jobs).pick().name == "due"


@pytest.mark.parametrize("busy", [True, False])
def test_clients_that_are_not_behind_are_forgotten(busy):
    queue = queue_of([Job(client="flood") for _ in range(20_000)] if busy else [])
    for n in range(10_000):
        queue.add(Job(client=n), now=float(n))
        queue.pick()
        queue.pick()
    assert len(queue._levels[NORMAL]._ends_s) <= 300


def test_a_joining_job_has_the_key_of_the_leader():
    same, other = Job(key="a"), Job(key="b")
    queue = queue_of([other, same])
    assert queue.pick_like(Job(key="a"), 1) is same
    assert queue.pick_like(Job(key="a"), 1) is None
    assert queue.pick() is other


def test_of_those_that_may_join_the_one_due_first_does():
    late, soon = Job(deadline=5.0), Job(deadline=1.0)
    assert queue_of([late, soon]).pick_like(Job(), 1) is soon


def test_jobs_of_higher_and_lower_levels_join_in_their_order():
    jobs = [Job(priority=p) for p in (LOW, NORMAL, HIGH)]
    queue = queue_of(jobs)
    assert [queue.pick_like(Job(), 1) for _ in range(4)] == [*jobs[::-1], None]


def test_nobody_joins_while_something_else_of_a_higher_level_waits():
    queue = queue_of([Job(key="a"), Job(key="b", priority=HIGH)])
    assert queue.pick_like(Job(key="a"), 1) is None
    assert len(queue) == 2


def test_something_else_of_the_same_or_a_lower_level_hinders_nobody():
    same = Job(key="a", priority=LOW)
    queue = queue_of([Job(key="b"), Job(key="b", priority=LOW), same])
    assert queue.pick_like(Job(key="a"), 1) is same


def test_critical_jobs_take_only_critical_ones_along():
    critical = Job(priority=CRITICAL)
    queue = queue_of([Job(), Job(priority=HIGH), critical])
    leader = Job(priority=CRITICAL)
    assert queue.pick_like(leader, 1) is critical
    assert queue.pick_like(leader, 1) is None
    assert len(queue) == 2


def test_a_job_is_discarded_once_and_only_while_it_waits():
    jobs = [Job(n) for n in range(10)]
    queue = queue_of(jobs)
    assert queue.discard(jobs[4])
    assert not queue.discard(jobs[4])
    assert queue.pick() is jobs[0]
    assert not queue.discard(jobs[0])
    assert [job.name for job in drain(queue)] == [1, 2, 3, 5, 6, 7, 8, 9]
