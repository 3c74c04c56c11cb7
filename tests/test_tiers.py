"""The disk tier: aligned buffers, swap folders, extents, and what happens on bad days. Real files on a real disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import json
import mmap
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from processes import longest_file
from shardwise import checkpoint, device
from shardwise.errors import OffloadError, ShardwiseError
from shardwise.tiers import mounts
from shardwise.tiers.aligned import ALIGN, BufferPool, aligned_empty, padded
from shardwise.tiers.disk import DiskStore, Extent
from shardwise.tiers.mounts import file_system, in_memory
from shardwise.tiers.probe import Probe, probe
from shardwise.tiers.swap import LOCK, SwapFolder, default_folder, remove_stale

SHM = Path("/dev/shm")
needs_shm = pytest.mark.skipif(not in_memory(SHM), reason="no tmpfs at /dev/shm")
CHUNK = 2 * ALIGN  # small, so that little tensors take several requests


def areas(sizes: list[int]) -> tuple[list[int], int]:
    """Where tensors lie that follow each other, each at an aligned offset; and the length of all."""
    return [sum(map(padded, sizes[:i])) for i in range(len(sizes))], sum(map(padded, sizes))


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.frombuffer(bytearray(random.Random(seed).randbytes(nbytes + 1)), dtype=torch.uint8)[:nbytes]


def store_at(folder: Path, **options: object) -> DiskStore:
    return DiskStore(folder, **{"chunk": CHUNK, "warn": False, **options})


@contextmanager
def behind_its_back(extent: Extent):
    """The extent's file, opened once more: it has no name, but the process has it."""
    fd = os.open(f"/proc/self/fd/{extent.fd}", os.O_RDWR)
    try:
        yield fd
    finally:
        os.close(fd)


# --- memory ----------------------------------------------------------------------------------------
def test_memory_is_aligned():
    for nbytes in (1, 4095, 4096, 4097, 3 << 20):
        tensor = aligned_empty(nbytes)
        assert tensor.numel() == nbytes and tensor.data_ptr() % ALIGN == 0 and tensor.dtype == torch.uint8
        tensor.fill_(7)
    assert [padded(n) for n in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


def test_a_pool_has_as_many_buffers_as_it_was_given():
    pool = BufferPool(2, 5000)
    assert pool.nbytes == 2 * 8192 and pool.live_bytes == 0
    first, second = pool.acquire(), pool.acquire()
    assert first.data_ptr() % ALIGN == second.data_ptr() % ALIGN == 0 and first.numel() == 8192
    assert pool.live_bytes == pool.nbytes == pool.peak_bytes
    with pytest.raises(OffloadError, match="all 2 host buffers"):
        pool.acquire()
    pool.release(first[:100].view(torch.float32))
    assert pool.live_bytes == 8192 and pool.acquire().data_ptr() == first.data_ptr()
    pool.release(first)
    with pytest.raises(OffloadError, match="not a buffer in use"):
        pool.release(first)
    with pytest.raises(OffloadError):
        BufferPool(0, 10)


def test_a_buffer_comes_back_when_its_write_has_ended(tmp_path):
    with store_at(tmp_path, chunk=1 << 18) as store:
        pool, extents = BufferPool(2, 1 << 20), [store.extent(f"u{i}", 1 << 20) for i in range(8)]
        for i, extent in enumerate(extents):
            buffer = pool.acquire().fill_(i)
            pool.release(buffer, store.write(extent, buffer))
        assert pool.peak_bytes == 2 << 20
        out = torch.empty(1 << 20, dtype=torch.uint8)
        for i, extent in enumerate(extents):
            store.read(extent, out).wait()
            assert (out == i).all()


def test_space_is_given_back_when_nothing_is_under_way_on_it(tmp_path):
    with store_at(tmp_path, chunk=1 << 18) as store:
        for _ in range(3):
            extent = store.extent("unit", 48 << 20)
            transfers = [store.write(extent, torch.full((48 << 20,), k, dtype=torch.uint8)) for k in range(2)]
            store.free(extent)
            assert all(t.done and t.error is None for t in transfers)


@pytest.mark.skipif(device.accelerator() is not None, reason="with an accelerator it works")
def test_pinning_needs_an_accelerator():
    with pytest.raises(OffloadError, match="accelerator"):
        BufferPool(1, 4096, pin=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locking is CUDA's")
def test_pinned_buffers():
    pool = BufferPool(2, 3 << 20, pin=True)
    buffer = pool.acquire().fill_(3)
    assert buffer.is_pinned() and buffer.data_ptr() % ALIGN == 0
    assert (buffer.to("cuda", non_blocking=True).cpu() == 3).all()
    del pool
    gc.collect()
    assert not buffer.is_pinned() and (buffer == 3).all()


# --- extents ---------------------------------------------------------------------------------------
OPS = st.lists(st.tuples(st.booleans(), st.integers(0, 1 << 20), st.integers(0, 1 << 20)), max_size=12)


@pytest.mark.parametrize("options", [{}, {"checksum": True}, {"direct": False}, {"depth": 1}], ids=str)
def test_whatever_is_written_anywhere_is_read_back_in_order(options, tmp_path):
    """Reads and writes that overlap, started without waiting: as if they took place one after the other."""
    with store_at(tmp_path, **options) as store:

        @settings(max_examples=25, deadline=None, database=None)
        @given(nbytes=st.integers(0, 5 * CHUNK), ops=OPS, shift=st.integers(0, 64))
        def check(nbytes, ops, shift):
            extent, oracle = store.extent("any", nbytes), torch.zeros(nbytes, dtype=torch.uint8)
            under_way = []
            for i, (is_write, a, b) in enumerate(ops):
                start, end = sorted((a % (nbytes + 1), b % (nbytes + 1)))
                if is_write:
                    data = aligned_empty(end - start + shift)[shift:]
                    data.copy_(noise(end - start, i))
                    oracle[start:end] = data
                    under_way.append((store.write(extent, data, start), data, data.clone()))
                else:
                    out = aligned_empty(end - start + shift)[shift:]
                    under_way.append((store.read(extent, out, start), out, oracle[start:end].clone()))
            for transfer, data, expected in reversed(under_way):
                transfer.wait()
                transfer.wait()
                assert torch.equal(data, expected)
            whole = torch.empty_like(oracle)
            store.read(extent, whole).wait()
            assert torch.equal(whole, oracle)
            store.free(extent)

        check()
        assert store.nbytes == 0


def test_any_dtype_and_shape(tmp_path):
    values = [
        torch.tensor(3.5),
        torch.randn(3, 5, 7, dtype=torch.bfloat16),
        torch.rand(1000) > 0.5,
        torch.arange(11),
        torch.randn(4, dtype=torch.complex64),
        nn.Parameter(torch.randn(33, 9)),
        torch.empty(0),
    ]
    offsets, total = areas([v.nbytes for v in values])
    with store_at(tmp_path) as store:
        extent = store.extent("all", total)
        for v, offset in zip(values, offsets, strict=True):
            store.write(extent, v, offset)
        for v, offset in zip(values, offsets, strict=True):
            out = torch.empty_like(v)
            store.read(extent, out, offset).wait()
            assert torch.equal(out, v)


def test_one_sweep_brings_a_unit(tmp_path):
    """Values and both moments lie in one extent; an update pipelined over units is the update without a disk."""
    units, n = 5, 3000
    expected = [list(torch.randn(3, n)) for _ in range(units)]
    offsets, total = areas([n * 4] * 3)
    with store_at(tmp_path) as store:
        extents = [store.extent(f"blocks.{u}", total) for u in range(units)]
        for u in range(units):
            for k in range(3):
                store.write(extents[u], expected[u][k], offsets[k])
        pool = BufferPool(3, total)

        def stage_in(u):
            buffer = pool.acquire()
            return store.read(extents[u], buffer[:total]), buffer

        coming = stage_in(0)
        for u in range(units):
            (transfer, buffer), coming = coming, stage_in(u + 1) if u + 1 < units else None
            transfer.wait()
            for k in range(3):
                buffer[offsets[k] : offsets[k] + n * 4].view(torch.float32).mul_(0.5).add_(k)
            pool.release(buffer, store.write(extents[u], buffer[:total]))
        store.drain()
        for u in range(units):
            for k in range(3):
                out = torch.empty(n)
                store.read(extents[u], out, offsets[k]).wait()
                assert torch.equal(out, expected[u][k] * 0.5 + k)


def test_counts(tmp_path):
    with store_at(tmp_path) as store:
        extent, data = store.extent("u", 100_000), noise(100_000)
        assert store.nbytes == padded(100_000)
        store.write(extent, data).wait()
        store.read(extent, data[:10], 5).wait()
        store.drain()
        stats = store.stats
        assert (stats.bytes_written, stats.bytes_read, stats.writes, stats.reads) == (100_000, 10, 1, 1)
        assert min(stats.write_s, stats.read_s, stats.wait_s) > 0 and 0 <= stats.hidden < 1
        assert max(stats.read_s, stats.write_s) <= stats.busy_s <= stats.read_s + stats.write_s + 1e-9
        store.reset_stats()
        assert store.stats.bytes_written == 0
        store.free(extent)
        assert store.nbytes == 0


def resident(fd: int, nbytes: int) -> int:
    """Bytes of a file in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = mmap.mmap(fd, nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    hold = ctypes.c_char.from_buffer(pages)
    seen = (ctypes.c_ubyte * (nbytes // mmap.PAGESIZE))()
    assert libc.mincore(ctypes.c_void_p(ctypes.addressof(hold)), ctypes.c_size_t(nbytes), seen) == 0
    del hold
    pages.close()
    return sum(x & 1 for x in seen) * mmap.PAGESIZE


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux page cache")
@pytest.mark.parametrize("direct", [True, False])
def test_the_page_cache_does_not_fill(direct, tmp_path):
    with store_at(tmp_path, direct=direct, chunk=1 << 20) as store:
        if in_memory(tmp_path):
            pytest.skip("the temporary folder lies in memory")
        extent, data = store.extent("u", 16 << 20), noise(16 << 20)
        store.write(extent, data).wait()
        store.read(extent, data).wait()
        with behind_its_back(extent) as fd:
            assert resident(fd, 16 << 20) == 0
            os.preadv(fd, [bytearray(1 << 20)], 0)
            assert resident(fd, 16 << 20) >= 1 << 20, "the meter does not measure"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["open", "pwrite", "preadv"])
def test_file_systems_without_direct_io_are_used_through_the_page_cache(call, code, tmp_path, monkeypatch):
    """Whatever they answer, and to which request: swap files, checkpoints and measurements all go on."""
    original = getattr(os, call)

    def refuses(*args, **kw):
        flags = args[1] if call == "open" else fcntl.fcntl(args[0], fcntl.F_GETFL)
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return original(*args, **kw)

    monkeypatch.setattr(mounts, "IN_MEMORY", frozenset())
    monkeypatch.setattr(os, call, refuses)
    data, back = noise(1 << 20), torch.empty(1 << 20, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with DiskStore(tmp_path, chunk=1 << 18) as store:
            extent = store.extent("u", 1 << 20)
            store.write(extent, data).wait()
            store.read(extent, back).wait()
    assert torch.equal(back, data)
    assert ["refuses direct I/O" in str(w.message) for w in seen] == [True]
    model = torch.nn.Linear(300, 400)
    path = checkpoint.save(tmp_path / "checkpoint", models=[model])
    other = torch.nn.Linear(300, 400)
    checkpoint.load(path, models=[other], verify=True)
    assert torch.equal(other.weight, model.weight)
    with Probe(tmp_path, 1 << 16, chunk=1 << 14) as disk:
        assert disk.read() > 0 and not disk.direct


# --- wrong use -------------------------------------------------------------------------------------
def test_wrong_requests_are_refused_and_harm_nothing(tmp_path):
    with store_at(tmp_path) as store, store_at(tmp_path) as other:
        extent, foreign = store.extent("u", 100), other.extent("v", 100)
        for wrong, says in [
            (lambda: store.write(extent, torch.zeros(101, dtype=torch.uint8)), "not inside its 100 bytes"),
            (lambda: store.read(extent, torch.zeros(1), -4), "not inside"),
            (lambda: store.write(extent, torch.zeros(4, 4)[:, 0]), "not contiguous"),
            (lambda: store.write(extent, torch.zeros(4, device="meta")), "on meta"),
            (lambda: store.write(foreign, torch.zeros(4)), "another store's"),
            (lambda: store.extent("w", -1), "-1 bytes"),
            (lambda: store_at(tmp_path, chunk=1000), "multiple of 4096"),
            (lambda: store_at(tmp_path, depth=0), "depth=0"),
            (lambda: store_at(tmp_path, timeout=float("nan")), "timeout=nan"),
        ]:
            with pytest.raises(OffloadError, match=says) as caught:
                wrong()
            assert isinstance(caught.value, (ShardwiseError, OSError)) and "fix:" in str(caught.value)
        store.write(extent, noise(100)).wait()
        store.free(extent)
        with pytest.raises(OffloadError, match="was freed"):
            store.read(extent, torch.zeros(1))
        store.close()
        store.close()
        with pytest.raises(OffloadError, match="closed"):
            store.extent("x", 1)
    assert os.listdir(tmp_path) == []


def test_a_store_that_nobody_holds_is_gone(tmp_path):
    gc.collect()  # what earlier tests have dropped
    files = len(os.listdir("/proc/self/fd"))
    store = store_at(tmp_path)
    transfer = store.write(store.extent("u", 1 << 20), noise(1 << 20))
    del store
    gc.collect()
    assert os.listdir(tmp_path) == [] and len(os.listdir("/proc/self/fd")) == files
    assert transfer.done


# --- bad days --------------------------------------------------------------------------------------
def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for folder, says in [(tmp_path / "none", "does not exist"), (tmp_path / "file", "not a folder")]:
        with pytest.raises(OffloadError, match=says) as caught:
            DiskStore(folder, rank=3)
        assert str(folder) in str(caught.value) and "rank 3" in str(caught.value) and "nvme_path" in str(caught.value)
        with pytest.raises(OffloadError, match=says):
            probe(folder, 1 << 20)
    private = tmp_path / "private"
    private.mkdir()
    private.chmod(0o500)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(OffloadError, match="not writable for this user"):
            DiskStore(private)
    finally:
        os.seteuid(user)


@needs_shm
def test_a_folder_in_memory_works_with_one_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = DiskStore(SHM, chunk=CHUNK)
        extent, data, out = store.extent("u", 50_000), noise(50_000), torch.empty(50_000, dtype=torch.uint8)
        for _ in range(3):
            store.write(extent, data)
            store.read(extent, out).wait()
        store.close()
    assert torch.equal(data, out) and not store.direct
    assert len(caught) == 1 and "lies in memory (tmpfs)" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DiskStore(SHM, warn=False).close()
        DiskStore(SHM, direct=False).close()
    assert not in_memory(default_folder())


def test_a_disk_that_is_too_small_is_found_when_space_is_reserved(tmp_path):
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with store_at(tmp_path) as store:
        kept = store.extent("small", 4096)
        with pytest.raises(OffloadError, match="disk is full") as caught:
            store.extent("blocks.7", 2 * free + (1 << 40))
        assert all(x in str(caught.value) for x in ("blocks.7", str(tmp_path), "needed", "free", "4.1 KB reserved"))
        assert caught.value.errno == errno.ENOSPC
        store.write(kept, noise(4096)).wait()  # the store goes on
        with pytest.raises(OffloadError, match="disk is full"):
            probe(tmp_path, 2 * free + (1 << 40))


@pytest.mark.parametrize("limit", [CHUNK, CHUNK + 4096])
def test_a_write_that_fails_ends_the_store(limit, tmp_path):
    """A real limit on the length of files stands for all that can happen to a write."""
    with store_at(tmp_path) as store:
        with longest_file(limit), pytest.raises(OffloadError, match="largest allowed size"):
            store.extent("too long", 4 * CHUNK)
        extent, other = store.extent("blocks.1", 4 * CHUNK), store.extent("blocks.2", CHUNK)
        store.write(other, noise(CHUNK)).wait()
        with longest_file(limit):
            with store._queue.lock:  # so that all three are started; two of them wait for the first
                failing = [store.write(extent, noise(4 * CHUNK)) for _ in range(3)]
            for transfer in failing:
                with pytest.raises(OffloadError, match=r"allowed size|took only") as caught:
                    transfer.wait()
                assert "blocks.1" in str(caught.value) and "extent-" in str(caught.value)
        for later in (lambda: store.read(other, torch.zeros(1)), lambda: store.extent("x", 1), store.drain):
            with pytest.raises(OffloadError, match=r"extent 'blocks.1'"):
                later()
        with pytest.raises(OffloadError, match=r"extent 'blocks.1'"):
            failing[0].wait()
    assert os.listdir(tmp_path) == []


def test_a_file_cut_short_is_an_error(tmp_path):
    with store_at(tmp_path) as store:
        extent = store.extent("blocks.1", 5 * CHUNK)
        store.write(extent, noise(5 * CHUNK)).wait()
        os.truncate(f"/proc/self/fd/{extent.fd}", 3 * CHUNK + 100)
        store.read(extent, torch.empty(3 * CHUNK, dtype=torch.uint8)).wait()
        with pytest.raises(OffloadError, match="the file ends at 24676 of 40960 bytes") as caught:
            store.read(extent, torch.empty(5 * CHUNK, dtype=torch.uint8)).wait()
        assert "blocks.1" in str(caught.value)


@pytest.mark.parametrize("at", [0, CHUNK + 17, 3 * CHUNK - 1, 4 * CHUNK + 99])
def test_a_changed_byte_is_found_with_checksums(at, tmp_path):
    nbytes = 4 * CHUNK + 100
    with store_at(tmp_path, checksum=True) as store:
        extent, data = store.extent("blocks.1", nbytes), noise(nbytes)
        store.write(extent, data).wait()
        store.write(extent, data[:50], 30).wait()
        out = torch.empty_like(data)
        store.read(extent, out).wait()
        with behind_its_back(extent) as fd:
            os.pwrite(fd, bytes([out[at].item() ^ 1]), at)
            os.fsync(fd)
        chunk = at // CHUNK
        with pytest.raises(OffloadError, match=f"bytes {chunk * CHUNK} to .* not those that were written") as caught:
            store.read(extent, out[:1], at).wait()
        assert "blocks.1" in str(caught.value)


def test_a_disk_that_does_not_answer_is_an_error(tmp_path):
    """No disk hangs on demand, so the lock that every request passes at its end is held instead."""
    with store_at(tmp_path, timeout=0.3) as store:
        extent = store.extent("blocks.1", CHUNK)
        with store._queue.lock:
            transfer = store.write(extent, noise(CHUNK))
            with pytest.raises(OffloadError, match="not finished any request"):
                transfer.wait()
        with pytest.raises(OffloadError, match="not finished any request"):
            store.write(extent, noise(CHUNK))


# --- folders ---------------------------------------------------------------------------------------
def test_a_folder_is_private_and_unique(tmp_path):
    first, second = SwapFolder(tmp_path, rank=1), SwapFolder(tmp_path, rank=1)
    assert first.path != second.path and "-r1-" in first.path
    for folder in (first, second):
        assert os.stat(folder.path).st_mode & 0o777 == 0o700 and first.removed == second.removed == []
        assert json.loads(Path(folder.path, LOCK).read_text())["pid"] == os.getpid()
    first.close()
    assert not os.path.exists(first.path) and os.path.exists(second.path)
    Path(second.path, "mine.txt").touch()
    second.close()
    assert set(os.listdir(second.path)) == {LOCK, "mine.txt"}
    assert remove_stale(tmp_path) == [], "a folder with somebody's file in it stays"


def test_only_left_over_swap_folders_are_removed(tmp_path):
    name = "shardwise-swap-r0-" + "0123456789abcdef"
    stale = tmp_path / name
    stale.mkdir()
    (stale / LOCK).write_text(json.dumps({"what": "shardwise swap folder", "host": "elsewhere"}))
    (stale / "extent-0.swap").write_bytes(b"x")
    empty = tmp_path / (name[:-1] + "e")
    empty.mkdir()
    others = {
        tmp_path / (name[:-1] + "1"): "{}",
        tmp_path / (name[:-1] + "2"): "not json",
        tmp_path / (name[:-1] + "3"): '["shardwise swap folder"]',
        tmp_path / "shardwise-swap-mine": json.dumps({"what": "shardwise swap folder"}),
    }
    for folder, text in others.items():
        folder.mkdir()
        (folder / LOCK).write_text(text)
    target = tmp_path / "target"
    target.mkdir()
    (target / LOCK).write_text(json.dumps({"what": "shardwise swap folder"}))
    (tmp_path / (name[:-1] + "4")).symlink_to(target)
    (tmp_path / (name[:-1] + "5")).write_text("a file")
    before = {p for p in tmp_path.rglob("*") if stale not in (p, *p.parents) and p != empty}
    folder = SwapFolder(tmp_path)
    assert sorted(folder.removed) == sorted(map(str, (stale, empty)))
    folder.close()
    assert set(tmp_path.rglob("*")) == before


ENDINGS = ["returns", "raises", "sigterm handled", "sigterm", "killed", "alive", "forks"]
SCRIPT = """
import faulthandler, gc, json, os, signal, sys, time, torch
from shardwise.tiers.disk import DiskStore
from shardwise.tiers.swap import SwapFolder
base, endings = sys.argv[1], json.loads(sys.argv[2])

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write: many processes share the pipe

def child(ending):
    store = DiskStore(base, rank=len(ending), chunk=4096)
    extent = store.extent("u", 1 << 20)
    store.write(extent, torch.ones(1 << 20, dtype=torch.uint8)).wait()
    if ending == "sigterm handled":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
    if ending == "forks":
        pid = os.fork()
        if pid == 0:
            try:
                store.write(extent, torch.ones(5))
            except OSError as error:
                say("forked:", str(error).splitlines()[0])
            raise SystemExit
        os.waitpid(pid, 0)
        out = torch.zeros(1 << 20, dtype=torch.uint8)
        store.read(extent, out).wait()
        assert out.all() and os.path.isdir(store.folder.path)
    say(f"ready {ending}:{os.getpid()}:{store.folder.path}")
    if ending == "raises":
        raise KeyError("on purpose")
    while ending in ("sigterm handled", "sigterm", "killed", "alive"):
        store.write(extent, torch.ones(1 << 20, dtype=torch.uint8)).wait()
        time.sleep(0.02)

def crowd():
    # Everybody starts, and removes what seems left over, at once: no living folder may go.
    for _ in range(15):
        folder = SwapFolder(base)
        time.sleep(0.002)
        if not os.path.exists(os.path.join(folder.path, "owner.json")):
            say("lost", folder.path)
        folder.close()
    say("crowd")
    os._exit(0)

faulthandler.register(signal.SIGUSR1, all_threads=True)  # the test asks those that do not end
jobs = [lambda e=e: child(e) for e in endings] + [crowd] * 3
torch.set_num_threads(1)
gc.freeze()
for job in jobs:
    if os.fork() == 0:
        job()
        sys.exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
say("over")
"""


def wait_gone(pid: int) -> None:
    end = time.monotonic() + 30
    while os.path.exists(f"/proc/{pid}"):  # the helper reaps it
        if time.monotonic() > end:
            os.kill(pid, signal.SIGUSR1)
            time.sleep(1)
            raise AssertionError(f"process {pid} does not end")
        time.sleep(0.01)


def test_nothing_is_left_however_a_process_ends(tmp_path):
    helper = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(ENDINGS)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    pids: dict[str, int] = {}
    paths: dict[str, str] = {}
    lines = []
    try:
        while len(pids) < len(ENDINGS) or lines.count("crowd") < 3:
            lines.append(helper.stdout.readline().strip())
            assert lines[-1] and not lines[-1].startswith("lost"), lines
            if lines[-1].startswith("ready "):
                ending, pid, paths[ending] = lines[-1].removeprefix("ready ").split(":")
                pids[ending] = int(pid)
        assert any(x.startswith("forked: ") and "forked process" in x for x in lines)
        for ending in ("killed", "sigterm", "sigterm handled"):
            os.kill(pids[ending], signal.SIGKILL if ending == "killed" else signal.SIGTERM)
        for ending in set(ENDINGS) - {"alive"}:
            wait_gone(pids[ending])
        left = {Path(paths[e]) for e in ("killed", "sigterm", "alive")}
        assert set(tmp_path.iterdir()) == left
        assert all(os.listdir(p) == [LOCK] for p in left), "the files' space is free without a new start"
        with store_at(tmp_path) as store:
            assert set(store.folder.removed) == {paths["killed"], paths["sigterm"]}
            assert set(os.listdir(tmp_path)) == {Path(paths["alive"]).name, Path(store.folder.path).name}
        os.kill(pids["alive"], signal.SIGKILL)
        wait_gone(pids["alive"])
        assert remove_stale(tmp_path) == [paths["alive"]] and os.listdir(tmp_path) == []
        assert helper.wait(30) == 0
        assert "on purpose" in helper.stderr.read()
    except BaseException:
        os.killpg(helper.pid, signal.SIGUSR1)
        time.sleep(1)
        print("from the processes:", lines)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of them: who holds a pipe would let the next line wait
            os.killpg(helper.pid, signal.SIGKILL)
        print(*helper.communicate(timeout=30), sep="\n")


# --- the probe -------------------------------------------------------------------------------------
def test_the_probe_measures_and_leaves_nothing(tmp_path):
    speed = probe(tmp_path, 4 << 20, chunk=1 << 20, depth=2)
    assert min(speed.read, speed.write, speed.mixed) > 1e5 and speed.direct == (not in_memory(tmp_path))
    with Probe(tmp_path, 1, chunk=1 << 20, depth=3) as disk:
        assert disk.nbytes == 2 << 20 and disk.mixed() > 0
    assert os.listdir(tmp_path) == []


@needs_shm
def test_file_systems_are_told_apart(tmp_path):
    assert file_system(SHM) == "tmpfs" == file_system(SHM / "not" / "there") and file_system("/proc") == "proc"
    assert not in_memory("/") or file_system("/") in ("tmpfs", "ramfs")
