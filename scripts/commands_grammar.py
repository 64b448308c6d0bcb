"""Sentence templates of the command data set: for every intent, those trained on and those held out.

A template is one line; `(a|b|)` is a choice, `{room}` a slot of `PLACEHOLDERS`.  `BLOCKS` rows are
`(intent, mood, constant slots, training lines, held-out lines)`; mood is `i` imperative, `q` question,
`s` statement or fragment, `x` taken as it is (no prefix).
"""

from __future__ import annotations

# fmt: off
KEY_ORDER = ["intent", "action", "device", "room", "except", "name", "title", "artist", "text", "quantity",
             "state", "level", "speed", "value", "delta", "unit", "ref", "repeat", "day", "time", "until", "delay",
             "duration", "reason", "replaces"]
# placeholder -> (kind of value, key in the call; None: heard but not passed on)
PLACEHOLDERS: dict[str, tuple[str, str | None]] = {
    "room": ("room", "room"), "xroom": ("room", "except"), "wroom": ("room", None),
    "machine": ("machine", "device"), "xmachine": ("machine", "except"), "wmachine": ("machine", None),
    "door": ("door", "device"), "xdoor": ("door", "except"), "wdoor": ("door", None),
    "valve": ("valve", "device"), "wvalve": ("valve", None), "tank": ("tank", "device"),
    "thing": ("thing", "device"), "q": ("q", "quantity"), "roomq": ("roomq", "quantity"),
    "setthing": ("setthing", "device"), "sp": ("setpoint", "value"), "pct": ("percent", "level"),
    "wpct": ("percent", None), "deg": ("degrees", "value"), "wdeg": ("degrees", None), "delta": ("delta", "delta"),
    "time": ("time", "time"), "wtime": ("time", None), "until": ("time", "until"), "day": ("day", "day"),
    "rep": ("repeat", "repeat"), "dur": ("duration", "duration"), "wdur": ("duration", None),
    "dura": ("duration_adj", "duration"), "delay": ("duration", "delay"), "title": ("title", "title"),
    "artist": ("artist", "artist"), "name": ("name", "name"), "text": ("text", "text"), "speed": ("speed", "speed"),
    "ref": ("ref", "ref"), "safety": ("safety", None), "topic": ("topic", None), "place": ("place", None),
    "language": ("language", None), "person": ("person", None), "rmachine": ("machine", None),
    "rroom": ("room", None), "rname": ("name", None), "rtext": ("text", None), "rsetthing": ("setthing", None),
    "rday": ("day", None), "sq": ("sq", "quantity"), "rotor": ("rotor", "device"), "rrotor": ("rotor", None),
}
ALL_BUT = "(except|except for|apart from|but not)"

L = "(lights|light|lamp)"
BLOCKS: list[tuple[str, str, dict, str, str]] = [
    ("set_light", "i", {"state": "on"}, f"""
        (turn|switch|put) on the {{room}} {L}
        (turn|switch|put) the {{room}} {L} on
        (turn|switch|put) on the {L} in the {{room}}
        (turn|switch|put) the {L} in the {{room}} on
        (get|have) the {{room}} {L} on
        light up the {{room}}""", """
        bring the {room} lights on
        (get|put) some light on in the {room}
        light the {room} for me
        give me some light in the {room}"""),
    ("set_light", "s", {"state": "on"}, """
        {room} (lights|light|lamp) on
        (lights|light|lamp) on in the {room}
        I (want|need) the {room} (lights|light|lamp) on
        I (want|need) the (lights|lamp) on in the {room}
        the {room} lights should be on""", """
        it's too dark in the {room}, lights on
        I'd like to have the lights in the {room} on
        the lights in the {room} need to be on"""),
    ("set_light", "i", {"state": "off"}, f"""
        (turn|switch) off the {{room}} {L}
        (turn|switch) the {{room}} {L} off
        (turn|switch) off the {L} in the {{room}}
        (turn|switch) the {L} in the {{room}} off
        (get|have) the {{room}} {L} off""", """
        take the {room} lights off
        make the {room} dark and turn its lights off
        let the {room} lights go off"""),
    ("set_light", "s", {"state": "off"}, """
        {room} (lights|light|lamp) off
        (lights|light|lamp) off in the {room}
        I (want|need) the {room} (lights|light|lamp) off
        nobody is in the {room}, lights off""", """
        it's too bright in the {room}, lights off
        the lights in the {room} need to be off"""),
    ("set_light", "i", {}, f"""
        (dim|set|bring|turn) the {{room}} {L} to {{pct}}
        (dim|set|bring|turn) the {L} in the {{room}} to {{pct}}
        (put|have) the {{room}} {L} at {{pct}}
        (put|have) the {L} in the {{room}} at {{pct}}
        set the {{room}} to {{pct}} (light|brightness)
        make the {{room}} {L} {{pct}} bright
        set the brightness in the {{room}} to {{pct}}""", """
        (adjust|take) the {room} lights to {pct}
        give the {room} {pct} light
        let the {room} lamp shine at {pct}
        in the {room}, set the lights to {pct}
        I'd like {pct} brightness in the {room}"""),
    ("set_light", "s", {}, """
        {room} (lights|light|lamp) (at|to) {pct}
        {pct} (light|brightness) in the {room}
        I (want|need) the {room} (lights|lamp) at {pct}
        the {room} lights should be at {pct}""", """
        {pct} for the {room} lights
        in the {room} I want {pct} light
        the lamp in the {room} needs to be at {pct}"""),
    *[("set_light", "i", {"room": "all", "state": s}, f"""
        (turn|switch) {s} (all the lights|every light|all lights) {ALL_BUT} the {{xroom}}
        (turn|switch) all the lights {s} {ALL_BUT} (the|in the) {{xroom}}
        lights {s} everywhere {ALL_BUT} the {{xroom}}
        (except for|apart from) the {{xroom}}, (turn|switch) {s} every light
        (turn|switch) {s} the lights in every room {ALL_BUT} the {{xroom}}""", f"""
        (turn|switch) {s} the lights in all rooms other than the {{xroom}}
        with the exception of the {{xroom}}, switch all the lights {s}
        switch the lights {s} everywhere, just not in the {{xroom}}
        every light {s}, only not the one in the {{xroom}}""") for s in ("on", "off")],
    ("set_temperature", "i", {}, """
        set the {room} to {deg}
        (set|change|turn) the temperature in the {room} to {deg}
        (set|change|turn) the {room} temperature to {deg}
        (set|turn) the (heating|thermostat) in the {room} to {deg}
        (set|turn) the {room} (heating|thermostat|heater) to {deg}
        (heat|cool) the {room} to {deg}
        keep the {room} at {deg}
        make the {room} {deg}
        bring the {room} to {deg}""", """
        get the {room} to {deg}
        adjust the {room} thermostat to {deg}
        let the {room} have {deg}
        take the temperature in the {room} to {deg}
        see that the {room} is at {deg}"""),
    ("set_temperature", "s", {}, """
        {room} (heating|temperature|thermostat|) (to|at) {deg}
        I (want|need) (it at|) {deg} in the {room}
        I (want|need) the {room} at {deg}
        the {room} should be {deg}
        {deg} in the {room}""", """
        I'd like the {room} to be {deg}
        the temperature in the {room} should be {deg}
        in the {room} I'd like {deg}"""),
    ("adjust_temperature", "i", {"_sign": 1}, """
        make the {room} {delta} (warmer|hotter)
        make it {delta} (warmer|hotter) in the {room}
        (raise|increase) the temperature in the {room} by {delta}
        (raise|increase) the {room} temperature by {delta}
        (turn|put) the {room} (heating|thermostat) up (by|) {delta}
        turn up the heating in the {room} by {delta}
        warm (up|) the {room} by {delta}""", """
        take the {room} up by {delta}
        heat the {room} by another {delta}
        let the {room} get {delta} warmer"""),
    ("adjust_temperature", "s", {"_sign": 1}, """
        {room} {delta} warmer
        I want the {room} {delta} warmer
        {delta} warmer in the {room}""", """
        the {room} should be {delta} warmer
        the {room} is {delta} too cold"""),
    ("adjust_temperature", "i", {"_sign": -1}, """
        make the {room} {delta} (cooler|colder)
        make it {delta} (cooler|colder) in the {room}
        (lower|reduce) the temperature in the {room} by {delta}
        (lower|reduce) the {room} temperature by {delta}
        (turn|put) the {room} (heating|thermostat) down (by|) {delta}
        turn down the heating in the {room} by {delta}
        cool (down|) the {room} by {delta}""", """
        take the {room} down by {delta}
        let the {room} get {delta} cooler
        drop the temperature in the {room} by {delta}"""),
    ("adjust_temperature", "s", {"_sign": -1}, """
        {room} {delta} cooler
        I want the {room} {delta} cooler
        {delta} cooler in the {room}""", """
        the {room} should be {delta} cooler
        the {room} is {delta} too warm"""),
    ("read_sensor", "q", {}, """
        what is the {thing} {q}
        what's the {q} of the {thing}
        what is the {q} (on|at) the {thing}
        (tell|give) me the {q} of the {thing}
        (read|check|show|get) the {thing} {q}
        (read|check|show) the {q} of the {thing}
        how high is the {q} (of|on) the {thing}
        I (need|want) the {thing} {q}
        what {q} does the {thing} have
        {thing} {q}""", """
        what does the {q} gauge on the {thing} say
        could I get the current {q} of the {thing}
        I'd like to know the {thing} {q}
        what {q} is the {thing} at right now
        (look up|report) the {q} for the {thing}"""),
    ("read_sensor", "q", {}, """
        what is the {roomq} in the {room}
        what's the {roomq} in the {room} (now|right now|)
        (tell|give) me the {roomq} in the {room}
        (read|check|show) the {roomq} in the {room}
        how high is the {roomq} in the {room}
        I (need|want) the {roomq} in the {room}
        what {roomq} do we have in the {room}""", """
        what {roomq} is it in the {room} at the moment
        I'd like to know the {roomq} in the {room}
        report the {roomq} for the {room}"""),
    *[("read_sensor", "q", {"quantity": quantity}, train, held) for quantity, train, held in [
        ("temperature", """
            how (warm|hot|cold) is (it in the|the) {room}
            how (warm|hot) is the {tank} (now|)
            how many degrees (is it|are there) in the {room}""", """
            how cool is it in the {room} right now
            how many degrees does the {room} have
            is the {tank} hot, how many degrees"""),
        ("humidity", """
            how (humid|damp|dry) is (it in the|the) {room}
            how humid is the air in the {room}""", """
            how moist is the air in the {room}
            is the {room} humid, by how much"""),
        ("level", """
            how full is the {tank}
            how (full is the {tank} now|much is left in the {tank})
            how much is (still|) in the {tank}""", """
            how empty is the {tank}
            how much does the {tank} still hold"""),
        ("speed", """
            how fast is the {rotor} (running|turning|going|)
            how fast does the {rotor} (run|turn)""", """
            at what speed does the {rotor} turn
            how quickly is the {rotor} turning""")]],
    ("set_point", "i", {}, """
        set the {setthing} {sq} to {sp}
        (set|change|bring|adjust) the {sq} of the {setthing} to {sp}
        (change|bring|adjust|put) the {setthing} {sq} to {sp}
        (raise|lower|take) the {setthing} {sq} to {sp}
        (keep|hold) the {setthing} {sq} at {sp}
        (keep|hold|have) the {sq} of the {setthing} at {sp}""", """
        get the {sq} on the {setthing} to {sp}
        regulate the {setthing} {sq} to {sp}
        let the {sq} of the {setthing} go to {sp}
        for the {setthing}, set the {sq} to {sp}"""),
    ("set_point", "s", {}, """
        {setthing} {sq} (to|at) {sp}
        I (want|need) the {setthing} {sq} at {sp}
        I (want|need) a {sq} of {sp} (in|on) the {setthing}
        the {sq} of the {setthing} should be {sp}
        the {setthing} should have a {sq} of {sp}
        new {setthing} {sq} is {sp}""", """
        {sp} is the new {sq} for the {setthing}
        the {setthing} needs a {sq} of {sp}
        on the {setthing} I want a {sq} of {sp}"""),
    ("set_timer", "i", {}, """
        (set|start) a timer for {dur}
        (set|start|make) a {dura} timer
        (set|start) (the|a) timer to {dur}
        (count down|time|run a timer for) {dur}
        give me a {dura} timer
        put {dur} on the timer""", """
        get a {dura} timer going
        let a timer run for {dur}
        tell me when {dur} have passed"""),
    ("set_timer", "i", {}, """
        (set|start) a timer for {dur} for the {name}
        (set|start|make) a {dura} timer for the {name}
        (set|start) a {dura} {name} timer
        (set|start) the {name} timer (for|to) {dur}
        for the {name}, (set|start) a timer for {dur}
        time the {name} for {dur}""", """
        put the {name} on a {dura} timer
        get a {name} timer going for {dur}
        the {name} will take {dur}, start a timer"""),
    ("set_timer", "s", {}, """
        {dura} timer
        timer for {dur}
        {dura} timer for the {name}
        {name} timer, {dur}
        I need a timer for {dur}
        I (need|want) a {dura} timer for the {name}""", """
        {dur} on the clock for the {name}
        I'd like a {name} timer of {dur}
        timer please, {dur} for the {name}"""),
    ("cancel_timer", "i", {}, """
        (cancel|stop|delete|end|clear) the {name} timer
        (cancel|stop|delete|end|clear) the timer for the {name}
        (turn|switch) off the {name} timer
        (turn|switch) the {name} timer off
        remove the {name} timer
        get rid of the {name} timer""", """
        call off the {name} timer
        drop the timer for the {name}
        take the {name} timer off
        abort the timer on the {name}"""),
    ("cancel_timer", "s", {}, """
        (we're|I'm) done with the {name}, cancel the timer
        I don't need the {name} timer (anymore|any more)
        no more {name} timer
        we don't need the timer for the {name}""", """
        the {name} timer isn't needed any longer
        there is no need for the {name} timer now
        the timer for the {name} can go"""),
    ("set_alarm", "i", {}, """
        wake me (up|) at {time}
        wake me (up|) at {time} {day}
        (set|make) an alarm for {time}
        (set|make|put) an alarm for {time} {day}
        (set|put) (the|my) alarm (to|for) {time}
        {day} wake me (up|) at {time}
        get me up at {time} (on time|)""", """
        have the alarm ring at {time}
        get me out of bed at {time} {day}
        make sure I am awake at {time}
        let the alarm go off {day} at {time}"""),
    ("set_alarm", "s", {}, """
        alarm (at|for) {time}
        alarm (at|for) {time} {day}
        I (want|have|need) to get up at {time}, (set an|) alarm (please|)
        I need an alarm {day} at {time}
        I (want|need) to be woken at {time}""", """
        I'd like an alarm at {time} {day}
        {day} I need the alarm to ring at {time}
        I must be up at {time}, set the alarm"""),
    ("remind", "i", {}, """
        remind me to {text} at {time}
        remind me at {time} to {text}
        remind me to {text} {day} at {time}
        remind me {day} at {time} to {text}
        at {time}, remind me to {text}
        {day} at {time} remind me to {text}
        (set|make|add) a reminder (for {time}|at {time}) to {text}
        (set|make|add) a reminder to {text} at {time} {day}
        tell me to {text} at {time}
        remind me in {delay} to {text}
        remind me to {text} in {delay}""", """
        give me a nudge to {text} at {time}
        leave me a reminder {day} at {time} to {text}
        don't let me forget to {text} at {time}
        put down a reminder to {text} at {time}
        when it is {time}, remind me to {text}"""),
    ("remind", "s", {}, """
        I (have|need|want) to {text} at {time}, remind me
        I need a reminder to {text} at {time}
        reminder at {time} (to|,) {text}
        reminder {day} at {time}, {text}""", """
        I mustn't forget to {text} at {time}
        {time} {day}, reminder to {text}"""),
    *[(f"{verb}_door", "i", {}, f"""
        {verb} the {{door}}
        {verb} the {{door}} (now|right away)
        (make sure|see that) the {{door}} is {verb}ed
        (have|get|keep|leave) the {{door}} {verb}ed
        check the {{door}} and {verb} it
        go to the {{door}} and {verb} it""", f"""
        {verb} that {{door}}
        the {{door}}, {verb} it
        ensure that the {{door}} is {verb}ed
        see to it that the {{door}} gets {verb}ed""") for verb in ("lock", "unlock")],
    *[(f"{verb}_door", "s", {}, f"""
        the {{door}} (should|must|has to) be {verb}ed
        I (want|need) the {{door}} {verb}ed
        I (want|need) to {verb} the {{door}}
        {{door}} {verb}ed""", f"""
        I'd like the {{door}} to be {verb}ed
        the {{door}} needs to be {verb}ed""") for verb in ("lock", "unlock")],
    *[(f"{verb}_door", "i", {"device": "all"}, f"""
        {verb} (all the doors|every door|all doors) {ALL_BUT} the {{xdoor}}
        {verb} everything {ALL_BUT} the {{xdoor}}
        (except for|apart from) the {{xdoor}}, {verb} (every door|all doors)""", f"""
        {verb} all the doors other than the {{xdoor}}
        with the exception of the {{xdoor}}, {verb} all doors
        {verb} every door, only not the {{xdoor}}""") for verb in ("lock", "unlock")],
    ("open_valve", "i", {}, """
        open the {valve}
        open (up|) the {valve} (for {dur}|to {pct})
        (turn|switch) the {valve} on
        (turn|switch) on the {valve} (for {dur}|)
        (set|turn|bring) the {valve} to {pct} (open|)
        put the {valve} at {pct}
        (leave|keep|have) the {valve} open (for {dur}|)
        for {dur}, open the {valve}""", """
        crack the {valve} open to {pct}
        let the {valve} be open for {dur}
        get the {valve} open
        adjust the {valve} so it is {pct} open"""),
    ("open_valve", "s", {}, """
        {valve} open
        {valve} (to|at) {pct}
        {valve} open (to {pct}|for {dur})
        I (want|need) the {valve} open
        I (want|need) the {valve} {pct} open
        the {valve} should be {pct} open""", """
        I'd like the {valve} opened
        the {valve} needs to be at {pct}
        the {valve} has to be open for {dur}"""),
    ("close_valve", "i", {}, """
        (close|shut) the {valve}
        shut off the {valve}
        shut the {valve} (completely|tightly)
        (turn|switch) off the {valve}
        (turn|switch) the {valve} off
        (make sure|see that) the {valve} is (closed|shut)
        (have|get|keep|leave) the {valve} (closed|shut)
        check the {valve} and close it
        close off the {valve}""", """
        seal the {valve}
        bring the {valve} to fully closed
        ensure the {valve} is shut
        the {valve}, close it"""),
    ("close_valve", "s", {}, """
        {valve} (closed|shut)
        I (want|need) the {valve} (closed|shut)
        the {valve} (should|must|has to) be (closed|shut)
        I (want|need) to (close|shut) the {valve}""", """
        I'd like the {valve} to be closed
        the {valve} needs to be shut"""),
]
