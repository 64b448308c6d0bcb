"""Write the quickstart's data set: device commands and the JSON calls they mean (calib_data/commands).

`python scripts/make_commands.py` rewrites the files byte for byte; `--check` exits 1 where the committed files differ.
Held-out rows use templates and slot values that no training row uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from commands_frames import CONTRAST, PREFIX, REPAIR, REPLACES, REPLACING, SCHEDULE, SCHEDULED, SUFFIX
from commands_grammar import BLOCKS, KEY_ORDER, PLACEHOLDERS
from commands_grammar_more import MORE_BLOCKS
from commands_values import (
    QUANTITIES,
    SETTABLE,
    SPLITS,
    UNITS,
    Value,
    draw,
    measured,
    number_style,
    words,
)
from commands_wider import SCHEDULED_SHARE, TIME_FORMS, TRAIN_WEIGHT, WIDER

ROOT = Path(__file__).resolve().parents[1] / "calib_data"
SEED = 20240611
INSTRUCTION = "Turn the command into one JSON call."
SIZES = {"train": 6000, "heldout": 600}
MIN_WORDS, MAX_WORDS, MAX_OUTPUT = 2, 21, 110
# intent -> (share of the rows, slots always there, slots that may be there)
_SCHED = ["day", "time", "delay", "replaces"]
SCHEMA: dict[str, tuple[int, list[str], list[str]]] = {
    "set_light": (50, ["room"], ["except", "state", "level", *_SCHED]),
    "set_temperature": (32, ["room", "value"], ["unit", *_SCHED]),
    "adjust_temperature": (20, ["room", "delta"], []),
    "read_sensor": (35, ["quantity"], ["device", "room"]),
    "set_point": (32, ["device", "quantity", "value", "unit"], ["day", "time", "delay"]),
    "set_timer": (28, ["duration"], ["name", "replaces"]),
    "cancel_timer": (13, ["name"], []),
    "set_alarm": (22, ["time"], ["day", "replaces"]),
    "remind": (25, ["text"], ["day", "time", "delay"]),
    "lock_door": (18, ["device"], ["except", *_SCHED]),
    "unlock_door": (16, ["device"], ["except", *_SCHED]),
    "open_valve": (24, ["device"], ["level", "duration", *_SCHED]),
    "close_valve": (17, ["device"], _SCHED),
    "play_media": (32, ["title"], ["room", "artist", "replaces"]),
    "pause_media": (13, ["room"], []),
    "set_volume": (18, ["room", "level"], ["day", "time", "delay"]),
    "start_machine": (33, ["device"], ["duration", *_SCHED]),
    "stop_machine": (30, ["device"], ["except", *_SCHED]),
    "schedule_machine": (26, ["device", "repeat", "time"], ["duration"]),
    "query_status": (28, ["device"], ["room"]),
    "set_fan": (22, ["room"], ["state", "speed", *_SCHED]),
    "set_blinds": (24, ["room"], ["state", "level", *_SCHED]),
    "forbid": (36, ["action"], ["device", "room", "state", "until"]),
    "correct": (44, [], ["ref", "room", "device", "level", "value", "unit", "duration", "time"]),
    "cancel": (6, ["ref"], []),
    "refuse": (52, ["reason"], []),
}
REPAIRABLE = ("room", "machine", "door", "valve", "tank", "percent", "degrees", "delta", "time", "duration", "setpoint")
NOUNS = ("room", "machine", "door", "valve", "tank", "rotor")
# A template that opens with one of these is no bare verb, so "could you" cannot stand before it.
NOT_A_VERB = frozenset(
    words("""in, for, i, i'd, i'm, we, we're, we'd, the, with, except, apart, every, at, on, off, no, lights, light,
    lamp, new, nobody, it's, reminder, alarm, timer, volume, don't, until, before, there""")
)


@dataclass
class Row:
    """One command with where it came from: its templates, its slot values and what makes it hard."""

    split: str
    intent: str
    core: str  # the intent's template
    template: str  # the same with the schedule, contrast or replacing phrase around it
    text: str
    call: dict
    values: list[tuple[str, object]] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)

    @property
    def output(self) -> str:
        return json.dumps(self.call, separators=(",", ":"), ensure_ascii=False)

    @property
    def line(self) -> str:
        row = {"instruction": INSTRUCTION, "input": self.text, "output": self.output}
        return json.dumps(row, ensure_ascii=False) + "\n"


def expand(line: str) -> list[str]:
    """Write out the `(a|b|)` choices of one template line, first to last."""
    found = re.search(r"\(([^()]*)\)", line)
    if not found:
        return [re.sub(r"\s+", " ", line).replace(" ,", ",").strip()]
    return [
        out for choice in found[1].split("|") for out in expand(line[: found.start()] + choice + line[found.end() :])
    ]


def templates(split: str) -> dict[str, list[tuple[str, dict, list[str]]]]:
    """Intent -> its lines in `split`, each as (mood, constant slots, written-out templates)."""
    table: dict[str, list] = {intent: [] for intent in SCHEMA}
    for intent, mood, const, *texts in BLOCKS + MORE_BLOCKS + WIDER:
        for line in texts[SPLITS.index(split)].strip().splitlines():
            table[intent].append((mood, const, expand(line.strip())))
    return table


def normal(text: str) -> str:
    """The form in which two inputs count as the same."""
    return re.sub(r"[^\w: ]", "", text.lower()).strip()


def slots_of(template: str) -> list[str]:
    return re.findall(r"\{(\w+)\}", template)


def kinds_of(template: str) -> list[str]:
    kinds = [PLACEHOLDERS[name][0] for name in slots_of(template)]
    return ["duration" if kind == "duration_adj" else kind for kind in kinds]


class ExhaustedError(Exception):
    """A row asks for more different values of a kind than its pool and form of speech have."""


class Filler:
    """Draws the values of one row, each from the pools of its split and no value twice."""

    def __init__(self, rng: random.Random, split: str):
        self.rng, self.split = rng, split
        self.style = number_style(rng)
        self.forms = {
            "time": rng.choice(TIME_FORMS[split]),
            "percent": rng.choice(["short", "long", "long"]),
            "degrees": rng.choice(["plain", "plain", "celsius", "fahrenheit"]),
        }
        self.drawn: list[tuple[str, object]] = []
        self.quantity = self.unit = self.thing = ""

    def _draw_once(self, kind: str) -> Value:
        if kind in ("thing", "setthing"):
            table = QUANTITIES if kind == "thing" else SETTABLE
            self.thing = self.rng.choice(["tank", "tank", "rotor", "line"])
            self.quantity = self.rng.choice(table[self.thing])
            self.unit = self.rng.choice(UNITS.get(self.quantity, [""]))
            return draw(self.thing, self.rng, self.split, self.style, "")
        if kind in ("q", "sq"):
            return Value(self.quantity, self.quantity)
        if kind == "setpoint":
            pool = "process celsius" if self.unit == "celsius" else self.unit
            said = "degrees celsius" if self.unit == "celsius" else self.unit
            return measured(self.rng, self.split, pool, self.style, said, self.unit)
        return draw(kind, self.rng, self.split, self.style, self.forms.get(kind, ""))

    def draw(self, kind: str) -> Value:
        for _ in range(100):
            value = self._draw_once(kind)
            if not any(pair in self.drawn for pair in value.drawn):
                self.drawn += value.drawn
                return value
        raise ExhaustedError(kind)


def repaired(template: str, rng: random.Random, split: str, mood: str) -> tuple[str, str] | None:
    """Mark one slot of the template as said wrong first: (template with {wrong} or {wrong_short}, slot)."""
    kinds = kinds_of(template)
    names = [
        n
        for n, k in zip(slots_of(template), kinds, strict=True)
        if k in REPAIRABLE and kinds.count(k) == 1 and n != "dura" and PLACEHOLDERS[n][1]
    ]
    if not names or mood in ("q", "x"):
        return None
    name = rng.choice(names)
    marker = rng.choice(REPAIR[split])
    marker += " " if marker.endswith(("that", "mean", "meant", "rather", "want")) else ", "
    the = "the " if f"the {{{name}}}" in template else ""
    # "lock all but the back door, no, the gate" could mean either, so an exception is repaired where it stands.
    if not name.startswith("x") and (rng.random() < 0.5 or template.endswith(f"{{{name}}}")):
        end = PLACEHOLDERS[name][0] in NOUNS
        return f"{template.replace('{' + name + '}', '{wrong}')}, {marker}{'the ' if end else ''}{{{name}}}", name
    return template.replace("{" + name + "}", f"{{wrong_short}}, {marker}{the}{{{name}}}"), name


def framed(rng: random.Random, split: str, intent: str, mood: str, core: str, const: dict) -> tuple[str, str, set[str]]:
    """Put contrast, politeness, schedule and replacing phrases around a core template.

    Returns the sentence template, the same without politeness (its identity) and the tags it earns; adds to `const`.
    """
    tags: set[str] = set()
    kinds, first, inner, frame = kinds_of(core), core.split()[0].strip(",").lower(), core, "{c}"
    verb_first = mood == "i" and not first.startswith("{") and first not in NOT_A_VERB
    nouns = [kind for kind in kinds if kind in ("room", "machine", "door", "valve")]
    dice = rng.random()
    if dice < 0.07 and intent in SCHEDULED and len(nouns) == 1 and "all" not in const.values():
        inner = rng.choice(CONTRAST[split]).replace("{c}", core).replace("{w}", f"{{w{nouns[0]}}}")
        tags.add("negation")
    timed = {"time", "day", "repeat"} & set(kinds)
    if rng.random() < SCHEDULED_SHARE[split] and intent in SCHEDULED and mood in "is" and not timed:
        frame = rng.choice(SCHEDULE[split])
        if ("{delay}" in frame and "duration" in kinds) or ("and then" in frame and not verb_first):
            frame = SCHEDULE[split][0]
    if 0.07 <= dice < 0.14 and intent in REPLACING and verb_first:
        outer = rng.choice(REPLACES[split])
        frame = outer.replace("{c}", frame) if frame.startswith("{c}") and "instead" not in outer else outer
        const["replaces"] = "last"
        tags.add("correction")
    polite = ""
    if verb_first and rng.random() < 0.4:
        pool = PREFIX[split]["i"] + (PREFIX["train"]["i"][:4] if split == "heldout" else [])
        polite = rng.choice(pool if frame.startswith("{c}") else ["", "please"])
    elif mood in "qs" and rng.random() < 0.2 and frame.startswith("{c}"):
        stacked = core.startswith(("tell me", "could", "let me", "do you", "(tell"))
        polite = "" if stacked else rng.choice(PREFIX[split][mood])
    return frame.replace("{c}", f"{polite} {inner}".strip()), frame.replace("{c}", inner), tags


def fill(filler: Filler, intent: str, template: str, const: dict) -> tuple[dict[str, str], dict]:
    """Draw every slot of the template: (slot -> words, the call)."""
    call = {key: value for key, value in const.items() if not key.startswith("_")}
    said: dict[str, str] = {}
    for slot in sorted(slots_of(template), key=lambda slot: "thing" not in slot):  # the thing decides its quantities
        if slot.startswith("wrong"):
            continue
        kind, key = PLACEHOLDERS[slot]
        value = filler.draw(kind)
        said[slot] = value.text
        if key and intent != "refuse":
            call[key] = value.out * const.get("_sign", 1) if key == "delta" else value.out
            if key == "value" and value.unit:
                call["unit"] = value.unit
    return said, {"intent": intent, **{key: call[key] for key in KEY_ORDER if key in call}}


def make_row(rng: random.Random, split: str, intent: str, line: tuple[str, dict, list[str]]) -> Row | None:
    """Make one row from a template line, or None where it came out too long."""
    mood, const, choices = line
    const, core = dict(const), rng.choice(choices)
    filler = Filler(rng, split)
    template, shape, tags = framed(rng, split, intent, mood, core, const)
    repair = repaired(template, rng, split, mood) if not tags and rng.random() < 0.18 else None
    if repair:
        template = repair[0]
        tags.add("correction")
    slots = [slot for slot in slots_of(template) if not slot.startswith("wrong")]
    if {"day", "rep"} & set(slots) and filler.forms["time"] == "tonight":
        filler.forms["time"] = "ampm"
    said, call = fill(filler, intent, template, const)
    if repair:
        wrong = filler.draw(PLACEHOLDERS[repair[1]][0])
        said |= {"wrong": wrong.text, "wrong_short": wrong.short or wrong.text}
    if intent == "forbid" or {"xroom", "xdoor", "xmachine"} & set(slots):
        tags.add("negation")
    tags |= {"correct": {"correction"}, "refuse": {"refusal"}}.get(intent, set())
    text = template.format(**said)
    if (intent in ("correct", "forbid") or (mood in "is" and template == shape and not tags)) and rng.random() < 0.25:
        thanks = rng.choice(SUFFIX[split])
        text += thanks if thanks.startswith(",") else f" {thanks}"
    row = Row(split, intent, core, shape, written(text, mood, rng), call, filler.drawn, tags)
    return row if MIN_WORDS <= len(text.split()) <= MAX_WORDS and len(row.output) <= MAX_OUTPUT else None


def written(text: str, mood: str, rng: random.Random) -> str:
    """Give the sentence its case and final stop: mostly spoken lower case, partly written."""
    dice = rng.random()
    if dice < 0.55:
        return text
    if dice < 0.565:
        return text.upper()
    text = text[0].upper() + text[1:]
    if dice < 0.65:
        return text
    openers = r"(could|can|would|what|what's|how|is|are|did|has|do|who|which|where|when|why|should|at what)"
    asks = re.match(rf"(.*, )?{openers} " if mood == "q" else rf"{openers} (you|we|i|about) ", text.lower())
    return text + ("?" if asks else ".")


def wanted(split: str) -> dict[str, int]:
    """How many rows each intent gets in `split`."""
    weights = {i: share * (TRAIN_WEIGHT.get(i, 1) if split == "train" else 1) for i, (share, *_) in SCHEMA.items()}
    total, size = sum(weights.values()), SIZES[split]
    counts = {intent: int(size * weight / total) for intent, weight in weights.items()}
    for intent in list(counts)[: size - sum(counts.values())]:
        counts[intent] += 1
    return counts


def build(seed: int = SEED) -> dict[str, list[Row]]:
    """Make both splits, shuffled, with provenance.  Raises AssertionError if one input would have two answers."""
    seen: dict[str, str] = {}
    splits: dict[str, list[Row]] = {}
    taught: dict[str, set[tuple[str, ...]]] = {}
    for split in SPLITS:
        rng = random.Random(f"{seed} {split}")
        table, rows = templates(split), []
        for intent, want in wanted(split).items():
            made = attempts = 0
            while made < want:
                attempts += 1
                assert attempts < 400 * want, f"{split}: only {made} of {want} rows for {intent}; add templates"
                try:
                    row = make_row(rng, split, intent, rng.choice(table[intent]))
                except ExhaustedError:
                    continue
                if row is None or (split == "heldout" and tuple(row.call) not in taught[intent]):
                    continue  # a held-out call has a set of keys that training shows for its intent
                key = normal(row.text)
                if key in seen:
                    assert seen[key] == row.output, f"{row.text!r} means both {seen[key]} and {row.output}"
                    continue
                seen[key] = row.output
                rows.append(row)
                made += 1
        rng.shuffle(rows)
        splits[split] = rows
        if split == "train":
            taught = {intent: {tuple(row.call) for row in rows if row.intent == intent} for intent in SCHEMA}
    return splits


def manifest(files: dict[str, bytes]) -> bytes:
    """What each file of calib_data is: digest, rows, licence."""
    about = {
        "commands/train.jsonl": "device commands and their JSON calls, training split (alpaca rows)",
        "commands/heldout.jsonl": "the same task in templates and slot values that training never shows (alpaca rows)",
        "commands/README.md": "the intents, their slots and the conventions of the JSON calls",
        "general/general.jsonl": "general questions and short answers, for calibration and for measuring forgetting "
        "(chat rows, written by hand)",
        "general_probe.jsonl": "general questions with four choices each, for measuring forgetting (multiple-choice "
        "rows, written by hand)",
    }
    entries = {}
    for path, what in about.items():
        data = files[path]
        rows = {"rows": data.count(b"\n")} if path.endswith(".jsonl") else {}
        entries[path] = {
            "sha256": hashlib.sha256(data).hexdigest(),
            **rows,
            "licence": "Apache-2.0",
            "source": "written by the project",
            "what": what,
        }
    note = {"generator": "scripts/make_commands.py", "seed": SEED, "files": entries}
    return (json.dumps(note, indent=2) + "\n").encode()


def render() -> dict[str, bytes]:
    """Every file this script owns, path under calib_data -> bytes."""
    files = {f"commands/{split}.jsonl": "".join(row.line for row in rows).encode() for split, rows in build().items()}
    written = ("commands/README.md", "general/general.jsonl", "general_probe.jsonl")
    by_hand = {path: (ROOT / path).read_bytes() for path in written}
    return files | {"MANIFEST.json": manifest(files | by_hand)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the command data set and calib_data/MANIFEST.json.")
    parser.add_argument("--check", action="store_true", help="exit 1 if a committed file differs; write nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder to write to or to check (calib_data)")
    args = parser.parse_args(argv)
    differing = []
    for path, data in render().items():
        target = args.root / path
        if args.check:
            if not target.is_file() or target.read_bytes() != data:
                differing.append(path)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    if differing:
        print(f"differs from what scripts/make_commands.py writes: {', '.join(differing)}; run it again")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
