"""Composed slot values for training only, so that copying a name is learned from many names instead of a few.

Each is two or three ordinary words. None of them equals a held-out value (`commands_values` asserts it).
"""

from __future__ import annotations

import random

SHARE = 0.65  # of a training row's names come from here


def words(text: str) -> list[str]:
    return [entry.strip() for entry in " ".join(text.split()).split(",") if entry.strip()]


# fmt: off
_WHICH = words("""amber, apple, back, big, birch, blue, bronze, canal, cedar, central, chapel, chestnut, clay,
    coastal, corner, courtyard, crystal, deep, double, elder, falcon, family, far, fern, fifth,
    forest, fourth, fox, front, gable, glass, granite, green, grey, hazel, heather, hill, indigo,
    inner, iron, ivory, jade, juniper, lake, lemon, lilac, lime, linden, little, long, lower, maple,
    market, middle, mill, moss, narrow, nook, oak, old, olive, opal, orange, outer, oval, park, pearl,
    pebble, pine, pink, plum, poplar, quarry, rear, red, ridge, river, robin, rose, round, ruby,
    rustic, saddle, sandy, scarlet, sixth, slate, spruce, square, stone, stork, teal, tower, twin,
    upper, valley, walnut, west, white, wide, willow, yellow, zinc, rotating, folding, sliding, humming,
    spinning, tilting, floating, hanging, heated, insulated, ventilated, polished, coiled, propane,
    ethanol, solvent, detergent, molasses, vinegar, basalt, cobalt, garment, charcoal, antechamber,
    underground, overhead, roadside, lakeside, secondary, auxiliary, portable, industrial, hydrogen""")
_ROOM = words("""alcove, annex, bay, booth, cabin, chamber, closet, corridor, den, dormitory, foyer, gallery,
    greenhouse, hall, hut, kitchen, landing, lobby, loft, lounge, nursery, office, parlour, pavilion,
    room, salon, shed, stairwell, studio, suite, terrace, veranda, wardrobe, workroom""")
_MACHINE = words("""aerator, auger, blower, bottler, burner, chipper, churn, compactor, conveyor, cooker, crane,
    cutter, dispenser, drill, dryer, fan heater, feeder, freezer, fryer, gin, grader, grinder, heater,
    hoist, incubator, kneader, lift, loader, loom, mangle, mixer, mower, oven, packer, peeler, planer,
    plotter, polisher, press, printer, pump, riveter, roaster, roller, sander, saw, scanner, sealer,
    separator, sharpener, slicer, spinner, steamer, stirrer, tiller, trimmer, tumbler, turbine,
    washer, welder, winch, winder, wrapper""")
_DOOR = words("""door, gate, entrance, hatch, shutter, turnstile, barrier, doorway, portal, trapdoor""")
_VALVE = words("""valve, relief valve, check valve, feed valve, globe valve, needle valve, stop valve, ball valve""")
_TANK = words("""tank, vat, silo, vessel, reactor, cistern, basin, hopper, kettle, drum, sump, cask, still, column""")
_LINE = words("""line, circuit, loop, header, pipe, main, riser, branch""")
_THING = words("""porridge, risotto, brownies, waffles, pancakes, omelette, bagels, pastry, custard, gravy, granola,
    cider, caramel, marinade, pickles, yoghurt, barley, polenta, ravioli, gnocchi, meringue, fudge,
    plaster, resin, primer, enamel, stretching, reading, piano practice, study break, power nap,
    ironing, drying rack, compost, tray, kettle, bath, cast""")
_DO = words("""wash, clean, paint, order, check, move, fold, repair, count, label, stack, open, return, weigh,
    sort, scan, polish, oil, replace, pack, measure, fetch, inspect, sweep, brush, charge, empty,
    rinse, tidy, wrap""")
_WHAT = words("""the windows, the crates, the hinges, the bins, the shelves, the tools, the barrels, the cables,
    the chairs, the gutters, the hoses, the jars, the ladders, the lamps, the mats, the nets, the
    ovens, the pipes, the plates, the racks, the ropes, the sacks, the seeds, the sheets, the shoes,
    the signs, the trays, the tubs, the vans, the walls, the bicycles, the batteries, the curtains,
    the candles, the pillows, the receipts, the tomatoes, the umbrellas""")
_TUNE = words("""anthem, ballad, blossom, caravan, castle, chorus, comet, crossroads, desert, echo, ember, falcon,
    ferry, fiddle, glacier, hymn, jungle, kite, lagoon, lullaby, magnet, meteor, moonrise, nightfall,
    ocean, parade, pendulum, prairie, quartet, rhapsody, serenade, shadow, skyline, snowfall, tango,
    temple, thistle, violin, waterfall, windmill""")
# fmt: on

_PARTS: dict[str, tuple[list[str], list[str]]] = {
    "room": (_WHICH, _ROOM), "machine": (_WHICH, _MACHINE),
    "rotor": (_WHICH, ["pump", "mixer", "grinder", "saw", "press"]),
    "door": (_WHICH, _DOOR), "valve": (_WHICH, _VALVE), "tank": (_WHICH, _TANK), "line": (_WHICH, _LINE),
    "title": (_WHICH, _TUNE), "name": ([""], _THING), "text": (_DO, _WHAT),
}  # fmt: skip


def wide_value(kind: str, rng: random.Random, heldout: list[str]) -> str | None:
    """Compose a training value of a kind that is copied, or give None for other kinds."""
    if kind not in _PARTS:
        return None
    first, second = _PARTS[kind]
    while True:
        value = f"{rng.choice(first)} {rng.choice(second)}".strip()
        if value not in heldout:
            return value
