"""``shardwise report``: its numbers, its page (read as text, and in a real browser), its trace."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import browser
from shardwise import cli
from shardwise.errors import MissingPackage
from shardwise.observe.recorded import read
from shardwise.report.facts import facts_of
from shardwise.report.page import page, write_page

STATES = ["parameters", "gradients"]
PEAK_FLOPS = 1e12


def write_run(
    folder: Path, world: int = 2, steps: int = 8, run: str = "a", unit: str = "blocks.0", **ends: bool
) -> Path:
    """A run as a recorder would have written it: rank 1 takes 30 ms more outside, for which rank 0 waits."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        device = {"type": "cuda", "name": "a <fast> one", "peak_flops": PEAK_FLOPS}
        lines = [
            {"kind": "run", "format": 1, "run": run, "rank": rank, "world": world, "time": 1000.0 + rank / 1000,
             "states": STATES, "device": device, "threads": 1, "torch": "2", "shardwise": "0"},
            {"kind": "model", "name": "GPT", "strategy": "zero3", "parameters": 1000, "trainable": 1000,
             "units": [unit]},
        ]  # fmt: skip
        for step in range(1, steps + 1):
            slow, start = rank == 1, 0.1 * (step - 1)
            seconds = {"forward": 0.03, "backward": 0.06 if not slow else 0.03, "outside": 0.01 + 0.03 * slow}
            first = round(start * 1e6)
            if step in (3, 4, 5):
                names = ["forward", f"'{unit}'", "backward", "outside", "", "gather", "reduce", "read", "request 1"]
                lines.append(
                    {"kind": "timeline", "step": step, "names": names, "left_out": 0,
                     "phases": [[first, 3, 4], [first + 10_000, 0, 1], [first + 40_000, 2, 1], [first + 100_000, 3, 4]],
                     "memory": [[first, 1000, 0], [first + 40_000, 1000, 1000]],
                     "transfers": [[first, first + 20_000, 5, 1, 100], [first, None, 7, 8, 50]],
                     "waits": [[first + 50_000, first + 80_000 - 30_000 * slow, 6, 1, 0]]}
                )  # fmt: skip
            lines.append(
                {"kind": "step", "step": step, "steps": 1, "start": start, "end": start + 0.1 + 0.9 * (step == 2),
                 "seconds": seconds, "waits": {"reduce": 0.03 * (not slow), "gather": 0.001}, "micro_batches": 1,
                 "sent": {"gather": 100, "reduce": 200}, "rows": 4, "tokens": 400,
                 "loss": 5.0 / step if step != 6 else "NaN", "values": {}, "live": [1000, 0],
                 "peak": [1000, 1000 + rank, 2000 + rank], "allocated": 5000,
                 "resident": 9000, "flops": 10**10 if step > 1 else None, "counting": step == 2, "clock": "host"}
            )  # fmt: skip
        if ends.get("ended", True):
            lines.append({"kind": "end", "time": 1.0, "peak": [1000, 1500], "peak_total": 2500, "recorder_s": 0.0})
        path = folder / f"{run}-rank{rank:05d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_numbers_and_their_sources(tmp_path):
    (write_run(tmp_path) / "plan.json").write_text(
        json.dumps({"device": {"states": {"parameters": 900, "activations": 5}}, "timing": {"seconds": 0.11}})
    )
    facts = facts_of(read(tmp_path))
    found = {fact.name: (fact.value, fact.source) for fact in facts.summary}
    assert found["a step"] == (pytest.approx(0.1), "measured")  # not the first, not the one that counted
    assert found["tokens/s"] == (pytest.approx(8000), "counted / measured")
    assert found["TFLOPS of a rank"][0] == pytest.approx(0.1)
    assert found["MFU"] == (pytest.approx(0.1), "counted / measured / datasheet")
    assert found["peak of all states"] == (2500, "counted") and found["peak of the device"] == (5000, "measured")
    assert all(fact.source for fact in facts.summary)
    assert "Rank 1 is the slowest" in facts.slowest[0] and "outside of the engine" in facts.slowest[0]
    assert "waits most for 'gather': 0.001 s" in facts.slowest[1]
    told = {one.name: (one.predicted, one.measured, one.difference) for one in facts.predictions}
    assert told == {
        "parameters": (900, 1000, pytest.approx(-0.1)),
        "activations": (5, None, None),
        "a step": (pytest.approx(0.11), pytest.approx(0.1), pytest.approx(0.1)),
    }


def test_without_a_peak_rate_or_flops_it_says_so(tmp_path):
    path = next(write_run(tmp_path, world=1, ended=False).iterdir())
    path.write_text(path.read_text().replace(f'"peak_flops": {PEAK_FLOPS}', '"peak_flops": null'))
    facts = facts_of(read(tmp_path))
    mfu = next(fact for fact in facts.summary if fact.name == "MFU")
    assert mfu.value is None and "no peak rate is known for 'a <fast> one'" in mfu.source
    assert "There is one rank" in facts.slowest[0] and any("no end: killed" in note for note in facts.notes)
    path.write_text(path.read_text().replace('"flops": 10000000000', '"flops": null'))
    tflops = next(fact for fact in facts_of(read(tmp_path)).summary if fact.name.startswith("TFLOPS"))
    assert tflops.value is None and "not counted" in tflops.source


class Read(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


def test_the_page_as_text(tmp_path):
    """Well-formed, nothing from elsewhere, names of units are texts, and every figure has its data."""
    pytest.importorskip("plotly", reason="plotly, of the extra 'report', is not installed")
    import plotly.graph_objects as go

    nasty = "</script><b>&'\""
    facts = facts_of(read(write_run(tmp_path, unit=nasty)))
    found = Read(page(facts, "var library;"))
    assert not found.open
    for _, attributes in found.tags:
        assert not {"src", "href"} & attributes.keys()
    figures = json.loads(next(text for text in found.texts["script"] if text.startswith("{")))
    shown = [a["data-figure"] for _, a in found.tags if "data-figure" in a]
    assert set(shown) <= figures.keys() and len(shown) == 6
    assert {a["value"] for tag, a in found.tags if tag == "option"} == figures.keys() - {
        "loss",
        "rate",
        "time",
        "memory",
    }
    for figure in figures.values():
        go.Figure(figure)  # raises for what plotly does not have
    assert figures["loss"]["data"][-1]["y"][5:7] == [5 / 7, 5 / 8]  # NaN is a gap
    hover = [text for trace in figures["step-5"]["data"] for text in trace["text"]]
    assert any("&lt;/script&gt;" in text for text in hover) and not any("</script>" in text for text in hover)
    small = [text for tag in ("small", "th", "figcaption") for text in found.texts[tag]]
    assert sum(source in text.lower() for text in small for source in ("measured", "counted", "datasheet")) > 10


@pytest.mark.skipif(browser.installed() is None, reason=f"no browser: none of {', '.join(browser.NAMES)} is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_in_a_browser(tmp_path, dark):
    """On a screen and on a phone: all figures are drawn, nothing sticks out, no error, no request."""
    pytest.importorskip("plotly", reason="plotly, of the extra 'report', is not installed")
    facts = facts_of(read(write_run(tmp_path / "run", unit="</script><b>x")))
    path = tmp_path / "report.html"
    write_page(facts, path)
    with browser.opened(tmp_path / "profile") as tab:
        for width, phone in ((1100, False), (390, True)):
            tab.look(width, 800, dark=dark, phone=phone)
            tab.open(path)
            tab.until("document.querySelectorAll('.plot').length === 6 && plots[0].querySelector('.scatterlayer path')")
            for k in range(6):  # drawn as one scrolls to them
                tab.run(f"plots[{k}].scrollIntoView()")
                tab.until(f"plots[{k}].querySelector('.main-svg') && plots[{k}].nextElementSibling.children.length")
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("Math.max(...plots.map((p) => p.getBoundingClientRect().right))") <= width
            light = tab.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
            ink = tab.run("plots[0]._fullLayout.font.color")
            assert (light < 60) == dark and ink == ("#e6e8eb" if dark else "#1c1e21")
        tab.look(390, 800, dark=not dark, phone=True)  # the theme changes while one looks
        tab.until(f"plots[0]._fullLayout.font.color === '{'#1c1e21' if dark else '#e6e8eb'}'")
        tab.run("s = document.querySelector('select'); s.value = 'step-3'; s.dispatchEvent(new Event('change'))")
        tab.until("document.getElementById('plot-timeline').dataset.drawn === 'step-3'")
        tab.run("document.querySelector('.legend button').click()")
        tab.until("document.querySelector('.legend button').getAttribute('aria-pressed') === 'false'")
        assert tab.problems == []
        assert [address for address in tab.requests if not address.startswith(("data:", path.as_uri()))] == []


def command(monkeypatch, capsys, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["shardwise", "report", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_trace_for_perfetto(tmp_path, monkeypatch, capsys):
    path = tmp_path / "trace.json"
    code, out, _ = command(monkeypatch, capsys, write_run(tmp_path / "run"), "--no-page", "--trace", path)
    assert code == 0 and f"written: {path}" in out.replace("\n", "") and "tokens/s" in out and "counted" in out
    found = json.loads(path.read_text())["traceEvents"]
    assert {event["pid"] for event in found} == {0, 1}
    spans = [e for e in found if e["ph"] == "X" and e["pid"] == 1 and e["tid"] == 0]
    assert [(e["name"], e["dur"]) for e in spans[:3]] == [
        ("outside", 10_000), ("forward 'blocks.0'", 30_000), ("backward 'blocks.0'", 60_000),
    ]  # fmt: skip
    assert spans[0]["ts"] == 200_000 + 1000  # the ranks' clocks on one axis
    begun = {e["id"]: e["ts"] for e in found if e["ph"] == "b"}
    ended = {e["id"]: e["ts"] for e in found if e["ph"] == "e"}
    assert begun.keys() == ended.keys() and all(ended[key] - begun[key] == 20_000 for key in begun)
    assert sum(e["ph"] == "C" for e in found) == 12
    code, out, _ = command(monkeypatch, capsys, tmp_path / "run", "--no-page", "--json")
    assert code == 0 and json.loads(out)["ranks"][1]["step_s"] == pytest.approx(0.1)


def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys):
    def refused(folder: Path, words: str, *args: object) -> None:
        code, out, err = command(monkeypatch, capsys, folder, *args)
        assert code == 2 and words in err and not out and "Traceback" not in err and len(err.splitlines()) <= 2, err

    refused(tmp_path / "none", "there is no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "there is no record in it")
    several = write_run(write_run(tmp_path / "several"), run="b")
    refused(several, "it holds 2 runs: a, b")
    assert command(monkeypatch, capsys, several, "--no-page", "--run", "b")[0] == 0
    damaged = write_run(tmp_path / "damaged")
    path = damaged / "a-rank00001.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + b"\n" + whole[2100:])
    refused(damaged, "is damaged")
    path.write_bytes(whole[:1500])  # as a kill leaves it
    code, out, _ = command(monkeypatch, capsys, damaged, "--no-page")
    assert code == 0 and "records of ranks 1 have no end" in out.replace("\n", " ")
    path.write_bytes(whole[:300])
    code, out, _ = command(monkeypatch, capsys, damaged, "--no-page")
    assert code == 0 and "Ranks 1 finished no step" in out.replace("\n", " ")
    (damaged / "a-rank00000.jsonl").unlink()
    refused(damaged, "no step is in this record")
    (write_run(tmp_path / "plan") / "plan.json").write_text("{}")
    refused(tmp_path / "plan", "it is no plan")
    refused(write_run(tmp_path / "short", steps=2), "no step of this record is in full", "--json", "--trace", "x.json")
    refused(write_run(tmp_path / "out"), "it cannot be written", "--json", "--no-page", "--trace", tmp_path)


def test_without_plotly_one_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingPackage, match=r"shardwise\[report\]"):
        write_page(facts_of(read(write_run(tmp_path / "run"))), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
