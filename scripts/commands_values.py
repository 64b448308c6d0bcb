"""Slot values of the command data set, split into a training and a held-out pool, and how they are spoken.

Every pool is `POOLS[kind][split]`; the two splits of one kind share no value.  Values are copied into the
call as spoken (lower case); numbers, times and durations are converted by the rules in this file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from commands_wide import SHARE, wide_value

SPLITS = ("train", "heldout")


def words(text: str) -> list[str]:
    """Split a comma-separated block into its entries."""
    return [entry.strip() for entry in text.replace("\n", " ").split(",") if entry.strip()]


# fmt: off
ROOMS = (
    words("""kitchen, bedroom, hallway, bathroom, living room, dining room, study, attic, cellar, garage, nursery,
    laundry room, guest room, pantry, office, porch, library, playroom, utility room, conservatory, main hall,
    upstairs bathroom, downstairs hallway, kids' room, boiler room, pump room, control room, workshop, warehouse,
    packing hall, cold store, loading bay, break room, server room, paint shop, tool room, meeting room, canteen,
    reception, back office, upstairs landing, front porch, wine cellar, guest bathroom, music room, sewing room,
    storage room, east wing, machine hall, drying room, test lab, locker room, first floor office, small bedroom,
    master bedroom, spare room, back hallway, milking parlour, germination room, filling hall, old stable, gym"""),
    words("""basement, sunroom, mud room, hobby room, great room, garden shed, upstairs office, second bedroom,
    compressor room, bottling hall, mixing hall, weighing room, staff kitchen, training room, archive room,
    south wing, welding shop, dressing room, games room, entrance hall"""),
)
MACHINES = (
    words("""feed pump, transfer pump, booster pump, sump pump, conveyor, main conveyor, belt dryer, mixer,
    dough mixer, dishwasher, washing machine, tumble dryer, coffee machine, robot vacuum, oven, bread maker,
    air compressor, backup compressor, dust extractor, exhaust blower, chiller, ice machine, heat pump, boiler,
    centrifuge, agitator, ball mill, hammer mill, crusher, bucket elevator, screw feeder, palletizer,
    labelling machine, capping machine, band saw, lathe, drill press, milling machine, air purifier,
    dehumidifier, water heater, pool pump, lawn sprinkler, fountain, kettle, slow cooker, rice cooker,
    backup generator, hydraulic press, shredder, bottle washer, sorting line, packing line, kiln, bale wrapper,
    vacuum pump, paper cutter, spray booth, cooling tower, grain dryer"""),
    words("""coolant pump, circulation pump, dosing pump, inclined conveyor, paint mixer, ribbon blender, ice crusher,
    garden sprinkler, espresso machine, window robot, toaster oven, screw compressor, fume extractor, humidifier,
    filling machine, shrink wrapper, belt sander, surface grinder, diesel generator, vibrating screen,
    pellet mill, pond pump, food processor, annealing furnace"""),
)
# Machines that turn or move, so that a speed or a vibration makes sense; drawn from the machine pools.
ROTATING = ("pump", "conveyor", "mixer", "dryer", "blower", "centrifuge", "agitator", "mill", "crusher", "elevator",
            "feeder", "saw", "lathe", "press", "blender", "compressor", "sander", "grinder", "screen", "generator")
ROTORS = tuple([m for m in pool if m.endswith(ROTATING) and "tumble" not in m] for pool in MACHINES)
DOORS = (
    words("""front door, back door, garage door, cellar door, patio door, balcony door, side door, kitchen door,
    main gate, garden gate, north gate, office door, warehouse door, loading gate, store room door, fire door,
    side entrance, stable door, server room door, attic hatch, delivery door, west entrance, lab door,
    greenhouse door, shed door, yard gate"""),
    words("""basement door, porch door, south gate, workshop door, car park gate, east entrance, delivery gate,
    staff door, terrace door, archive door"""),
)
VALVES = (
    words("""steam valve, main water valve, drain valve, bypass valve, inlet valve, outlet valve, gas valve,
    mixing valve, cooling valve, feed valve, air valve, tank valve, irrigation valve, garden valve, fuel valve,
    discharge valve, suction valve, return valve, purge valve, dosing valve, oil valve, east header valve,
    upper drain valve, caustic valve, rinse valve, boiler feed valve"""),
    words("""condensate valve, brine valve, vent valve, fill valve, hot water valve, nitrogen valve,
    lower drain valve, sprinkler valve, glycol valve, west header valve"""),
)
TANKS = (
    words("""boiler, feed tank, north silo, reactor, buffer tank, water tank, storage tank, fermenter, autoclave,
    mash tun, oil tank, steam drum, mixing tank, settling tank, grain silo, batch reactor, hot well, day tank,
    second fermenter, rainwater tank, brew kettle, wash tank, pressure vessel, digester"""),
    words("""south silo, dye tank, pilot reactor, expansion tank, syrup tank, third fermenter, milk tank,
    cement silo, hot water tank, evaporator"""),
)
LINES = (
    words("""feed line, steam line, cooling circuit, air line, supply line, return line, cooling loop, fuel line,
    hydraulic circuit, main header, drain line, gas line, process water line, heating circuit"""),
    words("""brine line, condensate line, glycol loop, oil circuit, oxygen line, rinse line"""),
)
_TITLE_A = (
    words("""silver, quiet, broken, golden, winter, paper, velvet, distant, hollow, crimson, early, northern, lucky,
    sleepy, endless, wooden, salty, gentle, electric, faded"""),
    words("""copper, misty, restless, marble, slow, tiny, violet, southern, dusty, frozen"""),
)
_TITLE_B = (
    words("""harbour, lanterns, river, letters, sparrows, avenue, mountain, machines, garden, thunder, postcards,
    horizon, orchard, railway, mirrors, summer, islands, compass"""),
    words("""lighthouse, feathers, carousel, meadow, satellites, station, bicycles, tide"""),
)
_TITLE_EXTRA = (
    words("""song for a heron, the baker's waltz, seven miles of rain, letters to nobody, my neighbour's piano,
    some jazz, the evening news, morning birdsong, a slow blues, rain sounds, the cooking podcast,
    tales from the old mill, dance of the kettles, the history podcast, classical guitar, radio harbour"""),
    words("""walking with foxes, the clockmaker's tango, nine days of snow, postcards to the moon, some swing,
    the gardening podcast, ocean sounds, solo piano, the science hour"""),
)
TITLES = tuple([f"{a} {b}" for a in _TITLE_A[i] for b in _TITLE_B[i]] + 6 * _TITLE_EXTRA[i] for i in (0, 1))
_FIRST = (
    words("nora, elias, marta, jonas, ivy, oscar, lena, felix, ruth, hugo, anna, tomas"),
    words("clara, emil, greta, anton, wilma, bruno"),
)
_LAST = (
    words("vale, lindqvist, okoro, brandt, marlow, santos, haas, kimura, teague, novak"),
    words("ferrow, adler, ibarra, moss, petrov"),
)
_BANDS = (
    words("the tin lanterns, the harbour choir, the red umbrellas, the quiet engines, the lake street band"),
    words("the glass foxes, the valley quartet, the blue ladders"),
)
ARTISTS = tuple([f"{a} {b}" for a in _FIRST[i] for b in _LAST[i]] + 4 * _BANDS[i] for i in (0, 1))
NAMES = (
    words("""pasta, rice, eggs, bread, laundry, pizza, tea, cake, chicken, cookies, potatoes, soup, oven, sauna,
    nap, dough, glue, batch, rinse, homework, roast, lentils, sample, workout, beans, stew, broth, face mask,
    varnish, dog walk, first coat, yeast, filter change, lasagne"""),
    words("""noodles, muffins, quinoa, turkey, paint, meditation, sourdough, dumplings, second coat, coffee,
    curing oven, steak"""),
)
TEXTS = (
    words("""call the plumber, water the plants, take out the trash, feed the cat, check the oil, pay the rent,
    clean the filters, pick up the kids, order more labels, call the dentist, grease the bearings, send the report,
    buy milk, walk the dog, defrost the freezer, empty the dishwasher, book the inspection, sign the delivery note,
    charge the forklift, return the library books, swap the gas bottle, mow the lawn, test the sirens,
    bring in the laundry, refill the salt, renew the passport, calibrate the scale, wash the car, thank the driver,
    count the pallets, take the medicine, check the tyre pressure, descale the kettle, print the tickets"""),
    words("""call the electrician, feed the fish, replace the gasket, pick up the parcel, iron the shirts,
    order spare fuses, bake the rolls, drain the radiator, collect the samples, email the landlord,
    sharpen the knives, visit the neighbour, change the bed sheets, inspect the belts"""),
)
# Words inside refused requests: never copied into a call.
SAFETY = (
    words("""smoke alarm, gas detector, emergency stop, safety interlock, light curtain, pressure relief system,
    fire sprinkler system, safety guard, overheat protection, leak detector, high pressure alarm, door interlock,
    flame sensor, overload protection, two-hand control, burst protection"""),
    words("""carbon monoxide detector, fire alarm, guard switch, emergency shutdown, low water cutoff,
    safety fence, gas alarm, thermal cutout"""),
)
TOPICS = (
    words("""autumn, my grandmother, the sea, friendship, old trains, a lost dog, space travel, the french revolution,
    chess openings, whales, volcanoes, ancient rome, black holes, jazz history, tax law, football"""),
    words("spring, a lonely robot, dinosaurs, the silk road, knitting, electric cars, mountain goats, opera"),
)
PLACES = (
    words("paris, kenya, norway, tokyo, peru, lisbon, canada, vienna, egypt, cape town, iceland, chicago"),
    words("madrid, vietnam, oslo, brazil, dublin, morocco, seoul"),
)
LANGUAGES = (words("french, german, italian, polish, japanese, swahili"), words("spanish, dutch, korean"))
PEOPLE = (
    words("my sister, anna, the bank, my boss, doctor brown, uncle joe, the school"),
    words("my cousin, peter, the insurance company, my landlord"),
)

# Numbers, by slot.  A number held out of one slot may be trained in another, so its word is never new.
_PCT_HELD = [12, 15, 18, 22, 27, 33, 35, 38, 42, 45, 48, 55, 58, 63, 65, 72, 77, 85, 88, 95]
_PCT = [n for n in range(1, 100) if n not in _PCT_HELD] + 3 * [5, 10, 20, 25, 30, 40, 50, 60, 70, 75, 80, 90]
_MIN_HELD = [7, 12, 13, 18, 22, 25, 33, 35, 40, 50, 55]
_MIN = [n for n in range(2, 60) if n not in _MIN_HELD] + 2 * [5, 10, 15, 20, 30, 45]
NUMBERS: dict[str, tuple[list, list]] = {
    "percent": (_PCT, _PCT_HELD),
    "celsius": ([15, 16, 18, 19, 20, 22, 24, 25, 27, 28, 18.5, 19.5, 20.5, 22.5], [17, 21, 23, 26, 17.5, 21.5, 23.5]),
    "fahrenheit": ([60, 62, 63, 65, 66, 67, 69, 70, 72, 73, 75, 76, 78], [61, 64, 68, 71, 74, 77]),
    "delta": ([1, 2, 4, 6, 7, 1.5], [3, 5, 2.5]),
    "minutes": (_MIN, _MIN_HELD),
    "hours": ([2, 4, 5, 6, 8, 10, 12], [3, 7, 9]),
    "seconds": ([10, 15, 20, 35, 40, 45, 55, 60, 80, 90], [25, 30, 50, 75]),
    "bar": ([1, 2, 3, 5, 6, 8, 9, 10, 12, 16, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 1.2, 2.8], [4, 7, 11, 14, 7.5, 8.5, 2.2]),
    "psi": ([20, 30, 35, 40, 45, 55, 60, 70, 75, 85, 90, 100, 110, 120], [25, 50, 65, 80, 95, 115]),
    "rpm": ([n for n in range(300, 3001, 50) if n % 250], list(range(500, 3001, 250))),
    "litres per minute": ([5, 8, 10, 14, 15, 18, 20, 24, 30, 36, 40, 45, 50, 60], [6, 12, 16, 25, 35, 42, 55]),
    "process celsius": (
        [n for n in range(40, 181) if n % 5 == 0 and n % 15] + [62, 68, 72, 78, 92],
        [*range(45, 181, 15), 63, 74, 82],
    ),
}
QUANTITIES = {
    "tank": ["temperature", "pressure", "level"],
    "rotor": ["temperature", "speed", "vibration", "voltage"],
    "line": ["pressure", "flow", "temperature"],
}
SETTABLE = {"tank": ["temperature", "pressure", "level"], "rotor": ["speed"], "line": ["pressure", "flow"]}
UNITS = {
    "temperature": ["celsius"],
    "pressure": ["bar", "psi"],
    "level": ["percent"],
    "speed": ["rpm"],
    "flow": ["litres per minute"],
}
REPEATS = {
    "daily": ["every day", "daily", "each day"],
    "weekdays": ["on weekdays", "every weekday"],
    "weekends": ["at weekends", "every weekend"],
}
WEEKDAYS = words("monday, tuesday, wednesday, thursday, friday, saturday, sunday")
REPEATS |= {day: [f"every {day}", f"on {day}s", f"each {day}"] for day in WEEKDAYS}
ENUMS = {
    "speed": ["low", "medium", "high"],
    "ref": ["other", "first", "second", "third", "left", "right"],
    "roomq": ["temperature", "humidity"],
}
# Clock times as minutes since midnight; every fifth five-minute step is held out.
_CLOCK = [h * 60 + m for h in range(5, 24) for m in [0, 0, 0, 5, 10, 15, 15, 20, 25, 30, 30, 35, 40, 45, 45, 50, 55]]
TIMES = ([t for t in _CLOCK if (t // 5) % 5 != 2], [t for t in _CLOCK if (t // 5) % 5 == 2])

POOLS: dict[str, dict[str, list]] = {
    kind: dict(zip(SPLITS, pair, strict=True))
    for kind, pair in {
        "room": ROOMS,
        "machine": MACHINES,
        "rotor": ROTORS,
        "door": DOORS,
        "valve": VALVES,
        "tank": TANKS,
        "line": LINES,
        "title": TITLES,
        "artist": ARTISTS,
        "name": NAMES,
        "text": TEXTS,
        "safety": SAFETY,
        "topic": TOPICS,
        "place": PLACES,
        "language": LANGUAGES,
        "person": PEOPLE,
        "time": TIMES,
        **NUMBERS,
    }.items()
}

# fmt: on
_ONES = words("""zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen,
fifteen, sixteen, seventeen, eighteen, nineteen""")
_TENS = words("-, -, twenty, thirty, forty, fifty, sixty, seventy, eighty, ninety")


def spell(number: float, joiner: str = "-") -> str:
    """Spell a number below 200 in English words: 21.5 -> "twenty-one point five"."""
    if number != int(number):
        return f"{spell(int(number), joiner)} point {_ONES[round(number * 10) % 10]}"
    n = int(number)
    if n >= 100:
        return "one hundred" + (f" and {spell(n - 100, joiner)}" if n > 100 else "")
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (joiner + _ONES[n % 10] if n % 10 else "")


def say_number(number: float, style: str) -> str:
    return f"{number:g}" if style == "digits" or number >= 200 else spell(number, " " if style == "spaced" else "-")


def say_time(minutes: int, form: str) -> str | None:
    """Speak a clock time in one form, or None where the form does not fit the time."""
    h, m = divmod(minutes, 60)
    if form == "24h":
        return f"{h:02d}:{m:02d}"
    if form == "ampm":
        if h == 12:  # "12 pm" is read both ways
            return None
        return f"{(h - 1) % 12 + 1}{f':{m:02d}' if m else ''} {'am' if h < 12 else 'pm'}"
    past = {
        5: "five past",
        10: "ten past",
        15: "quarter past",
        20: "twenty past",
        25: "twenty-five past",
        30: "half past",
        35: "twenty-five to",
        40: "twenty to",
        45: "quarter to",
        50: "ten to",
        55: "five to",
    }
    shown = h + (form == "past" and m > 30)
    if h == 12 or shown in (12, 24) or (form == "past" and not m) or (form == "plain" and m % 15):
        return None
    part = "in the morning" if shown < 12 else "in the afternoon" if shown < 18 else "in the evening"
    hour = _ONES[(shown - 1) % 12 + 1]
    if form == "past":
        return f"{past[m]} {hour} {part}"
    if form == "tonight":
        return f"{hour} tonight" if shown >= 18 and m == 0 else None
    return f"{hour} {spell(m)} {part}" if m else f"{hour} {part}"


@dataclass(frozen=True)
class Value:
    """One slot value: how it is said, what it becomes, and the (pool, value) pairs it was drawn from."""

    text: str
    out: object
    drawn: tuple[tuple[str, object], ...] = ()
    short: str = ""  # the text without its unit, for "20, no, 40 percent"
    unit: str | None = None


def number_style(rng: random.Random) -> str:
    return rng.choice(["digits", "digits", "words", "words", "spaced"])


def measured(rng, split, pool, style, unit_text, unit=None) -> Value:
    number = rng.choice(POOLS[pool][split])
    said = say_number(number, style)
    unit_text = unit_text.removesuffix("s") if number == 1 and unit_text == "degrees" else unit_text
    return Value(f"{said}{'' if unit_text == '%' else ' '}{unit_text}", number, ((pool, number),), said, unit)


def duration(rng, split, style, adjective=False) -> Value:
    """A duration, said as minutes, hours, seconds or two of them, in ISO 8601 exactly as said (90 s is PT90S)."""

    def pick(unit):
        return rng.choice(POOLS[unit][split])

    def say(n, unit):
        return f"{say_number(n, style)} {unit}"

    if adjective:
        n = pick("minutes")
        return Value(f"{say_number(n, style)} minute", f"PT{n}M", (("minutes", n),))
    form = rng.choice(["m"] * 8 + ["h"] * 2 + ["s"] * 2 + ["hm"] + ["fixed"] * 2)
    if form == "fixed" and split == "train":
        text, iso = rng.choice(
            [
                ("half an hour", "PT30M"),
                ("an hour", "PT1H"),
                ("one hour", "PT1H"),
                ("a minute", "PT1M"),
                ("an hour and a half", "PT1H30M"),
                ("a quarter of an hour", "PT15M"),
            ]
        )
        return Value(text, iso, (("fixed duration", iso),))
    if form == "hm":
        h, m = pick("hours"), rng.choice([n for n in POOLS["minutes"][split] if n % 5 == 0 and n > 5])
        return Value(f"{say(h, 'hours')} and {say(m, 'minutes')}", f"PT{h}H{m}M", (("hours", h), ("minutes", m)))
    unit = {"h": "hours", "s": "seconds"}.get(form, "minutes")
    n = pick(unit)
    return Value(say(n, unit), f"PT{n}{unit[0].upper()}", ((unit, n),), say_number(n, style))


def draw(kind: str, rng: random.Random, split: str, style: str, form: str) -> Value:
    """Draw one value of `kind` from the pools of `split`; `style` and `form` fix how numbers and times are said."""
    if kind == "percent":
        return measured(rng, split, "percent", style, "%" if form == "short" and style == "digits" else "percent")
    if kind == "degrees":
        scale = form if form in ("celsius", "fahrenheit") else None
        pool = "fahrenheit" if scale == "fahrenheit" else "celsius"
        return measured(rng, split, pool, style, f"degrees {scale}" if scale else "degrees", scale)
    if kind == "delta":
        return measured(rng, split, "delta", style, "degrees")
    if kind in ("duration", "duration_adj"):
        return duration(rng, split, style, kind == "duration_adj")
    if kind == "time":
        while True:
            minutes = rng.choice(POOLS["time"][split])
            text = say_time(minutes, form)
            if text:
                return Value(text, f"{minutes // 60:02d}:{minutes % 60:02d}", (("time", minutes),), text)
    if kind == "day":
        day = rng.choice(["tomorrow"] * 4 + WEEKDAYS)
        return Value(day if day == "tomorrow" else f"on {day}", day)
    if kind == "repeat":
        repeat = rng.choice(["daily"] * 3 + list(REPEATS))
        return Value(rng.choice(REPEATS[repeat]), repeat)
    if kind in ENUMS:
        value = rng.choice(ENUMS[kind])
        return Value(value, value)
    source = "machine" if kind == "rotor" else kind
    wide = None
    if split == "train" and rng.random() < SHARE:
        wide = wide_value(kind, rng, POOLS[source]["heldout"])
    value = wide or rng.choice(POOLS[kind][split])
    return Value(value, value, ((source, value),), value)
