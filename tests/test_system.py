"""What is said about the machine, on machines made of files."""

import ctypes
import os
import platform
import sys
import types

import ctranslate2
import pytest

from speechrnt import system

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="cgroups and affinity are Linux's")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes a machine of `cores`, a line of /proc/self/cgroup each and files."""

    def make(cores, memberships=(), **files):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        (tmp_path / "cgroup").write_text("".join(line + "\n" for line in memberships))
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        monkeypatch.setattr(system, "_CGROUP_MEMBERSHIPS", tmp_path / "cgroup")
        monkeypatch.setattr(system, "_CGROUP_ROOT", tmp_path / "fs")

    return make


def v1(group, quota, period=100_000):
    return {f"{group}/cpu.cfs_quota_us": f"{quota}\n", f"{group}/cpu.cfs_period_us": f"{period}\n"}


# Cores


@on_linux
def test_the_cores_of_this_process_can_be_counted():
    assert 1 <= system.usable_cores() <= len(os.sched_getaffinity(0))


@on_linux
@pytest.mark.parametrize("cores", [1, 2, 96])
def test_without_a_quota_the_affinity_counts(machine, cores):
    machine(cores)
    assert system.usable_cores() == cores


@on_linux
@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("20000 100000", 1),
        ("1000 1000000", 1),
        ("9900000 100000", 8),
        ("", 8),
        ("nonsense", 8),
        ("1 2 3", 8),
    ],
)
def test_a_quota_of_cgroup_v2_counts_in_whole_cores(machine, quota, cores):
    machine(8, ["0::/job"], **{"job/cpu.max": f"{quota}\n"})
    assert system.usable_cores() == cores


@on_linux
def test_the_strictest_group_of_cgroup_v2_counts(machine):
    quotas = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "7 1"}
    machine(8, ["0::/a/b/c"], **quotas, **{"other/cpu.max": "1 1", "a/b/c/d/cpu.max": "1 1"})
    assert system.usable_cores() == 3


@on_linux
@pytest.mark.parametrize("path", ["/", "/host/path/not/here", "/../../outside"])
def test_inside_a_container_of_cgroup_v2_the_root_counts(machine, path):
    machine(8, [f"0::{path}"], **{"cpu.max": "200000 100000"})
    assert system.usable_cores() == 2


@on_linux
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize(
    ("quota", "cores"), [(-1, 8), (400_000, 4), (150_000, 2), (10_000, 1), ("nonsense", 8)]
)
def test_a_quota_of_cgroup_v1_counts_in_whole_cores(machine, controllers, quota, cores):
    machine(
        8, ["7:memory:/job", f"4:{controllers}:/job", "1:name=systemd:/x"], **v1("cpu/job", quota)
    )
    assert system.usable_cores() == cores


@on_linux
def test_the_strictest_group_of_cgroup_v1_counts(machine):
    groups = {**v1("cpu", -1), **v1("cpu/a", 300_000), **v1("cpu/a/b", 700_000)}
    machine(8, ["4:cpu,cpuacct:/a/b"], **groups, **v1("cpu/other", 1))
    assert system.usable_cores() == 3


@on_linux
def test_inside_a_container_of_cgroup_v1_the_root_counts(machine):
    machine(8, ["4:cpu,cpuacct:/docker/0123"], **v1("cpu", 50_000))
    assert system.usable_cores() == 1


@on_linux
def test_controllers_that_only_sound_alike_do_not_count(machine):
    machine(8, ["3:cpuset:/job", "2:cpuacct:/job"], **v1("cpuset/job", 1), **v1("cpuacct/job", 1))
    assert system.usable_cores() == 8


@on_linux
def test_in_hybrid_mode_the_quota_of_cgroup_v1_counts(machine):
    machine(8, ["4:cpu,cpuacct:/job", "0::/job"], **v1("cpu/job", 200_000))
    assert system.usable_cores() == 2


@on_linux
def test_a_group_may_have_a_strange_name(machine):
    machine(8, ["0::/a:b\\x2d/ü"], **{"a:b\\x2d/ü/cpu.max": "200000 100000"})
    assert system.usable_cores() == 2


@on_linux
def test_without_cgroups_the_affinity_counts(machine, monkeypatch, tmp_path):
    machine(5)
    monkeypatch.setattr(system, "_CGROUP_MEMBERSHIPS", tmp_path / "none")
    assert system.usable_cores() == 5


@pytest.mark.parametrize(("count", "cores"), [(6, 6), (None, 1)])
def test_outside_linux_all_cores_count(machine, monkeypatch, count, cores):
    machine(2)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(os, "cpu_count", lambda: count)
    assert system.usable_cores() == cores


# Processor


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: Some CPU @ 3: x\nflags\t: a\n", "Some CPU @ 3: x"),
        ("processor\t: 0\nBogoMIPS\t: 1\n", "aarch64"),
        ("", "aarch64"),
        (None, "aarch64"),
    ],
)
def test_the_processor_has_a_name(tmp_path, monkeypatch, cpuinfo, name):
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(system, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert system.cpu_name() == name


# GPU


def test_with_a_gpu_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 1)
    assert system.why_no_gpu() is None


def test_outside_linux_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert system.why_no_gpu() == "CUDA is not supported on Darwin"


def test_a_missing_driver_is_said(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert system.why_no_gpu() == "no NVIDIA driver is installed (libcuda.so.1 was not found)"


@pytest.mark.parametrize(
    ("code", "version", "sentence"),
    [
        (100, 12090, "the NVIDIA driver sees no GPU"),
        (803, 12090, "the NVIDIA driver cannot be used here (cuInit returned error 803)"),
        (0, 11080, "the NVIDIA driver is too old: it supports CUDA 11.8, and 12.0 is needed"),
        (0, 12000, "the NVIDIA driver sees a device, but this build of CTranslate2 does not"),
    ],
)
def test_a_driver_without_use_is_said(monkeypatch, code, version, sentence):
    def get_version(result):
        result._obj.value = version

    monkeypatch.setattr(ctranslate2, "get_cuda_device_count", lambda: 0)
    monkeypatch.setattr(sys, "platform", "linux")
    driver = types.SimpleNamespace(cuInit=lambda flags: code, cuDriverGetVersion=get_version)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert system.why_no_gpu() == sentence


class TestUsableMemory:
    """What the default limit is half of."""

    @pytest.fixture
    def limited(self, tmp_path, monkeypatch):
        """A function that puts this process in a control group, and limits into files."""

        def limit(membership, **limits):
            (tmp_path / "cgroup").write_text(membership)
            for directory, limit in limits.items():
                file = tmp_path / "fs" / directory.replace("_", "/")
                file.mkdir(parents=True, exist_ok=True)
                (file / "memory.max").write_text(limit)
                (file / "memory.limit_in_bytes").write_text(limit)

        monkeypatch.setattr(system, "_CGROUP_MEMBERSHIPS", tmp_path / "cgroup")
        monkeypatch.setattr(system, "_CGROUP_ROOT", tmp_path / "fs")
        return limit

    def physical(self):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def test_without_a_container_the_machine_counts(self, limited):
        assert system.usable_memory() == self.physical()

    def test_the_strictest_group_of_cgroup_v2_counts(self, limited):
        limited("0::/a/b\n", a="1000000\n", a_b="max\n")
        assert system.usable_memory() == 1000000

    def test_a_group_of_cgroup_v1_counts(self, limited):
        limited("4:cpu:/x\n3:memory:/a\n", memory_a="2000000\n", cpu_x="1\n")
        assert system.usable_memory() == 2000000

    @pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "nonsense"])
    def test_a_group_without_a_limit_does_not_count(self, limited, limit):
        limited("0::/a\n", a=limit)
        assert system.usable_memory() == self.physical()
