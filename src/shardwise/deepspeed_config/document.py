"""The table of all keys for ``docs/from_deepspeed.md``: ``python -m shardwise.deepspeed_config.document`` prints it."""

from __future__ import annotations

from shardwise.deepspeed_config.keys import Key, Kind, Table
from shardwise.deepspeed_config.tables import TABLES

_ALIAS = "bfloat16"


def table_of_keys() -> str:
    """Markdown: a table for each section, with a column for an Accelerator's plugin where it has something to say."""
    parts = []
    for section, table in TABLES.items():
        if section != _ALIAS:
            parts += [f"### {f'`{section}`' if section else 'At the top'}", "", *_lines(table), ""]
    return "\n".join(parts)


def _lines(table: Table) -> list[str]:
    two = any(key.accelerate is not None for key in table.values())
    lines = ["| key | here |" + " an Accelerator's plugin |" * two, "|---|---|" + "---|" * two]
    rows: dict[Key, list[str]] = {}
    for name, key in table.items():
        rows.setdefault(key, []).append(f"`{name}`")
    for key, names in rows.items():
        other = f" {'the same' if key.accelerate is None else _words(key.accelerate)} |" * two
        lines.append(f"| {', '.join(names)} | {_words(key)} |{other}")
    return lines


def _words(key: Key) -> str:
    text = f"**{key.kind.value}**: {key.says}"
    return f"{text}. Instead: {key.fix}" if key.kind is Kind.REFUSED else text


if __name__ == "__main__":
    print(table_of_keys())
