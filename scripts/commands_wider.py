"""More ways to say things, for training alone: a small model copes with new phrases once it has seen many.

Rows of `WIDER` are blocks as in `commands_grammar`, without held-out lines. `TRAIN_WEIGHT` shows intents that are hard
to convert (units, clock times, prohibitions) more often than the held-out rows do.
"""

from __future__ import annotations

from commands_frames import VERBS

# intent -> how many times its share of the held-out rows it has in training
TRAIN_WEIGHT = {"set_point": 1.4, "set_alarm": 1.8, "schedule_machine": 1.9, "remind": 1.6, "forbid": 1.5,
                "set_temperature": 1.3, "start_machine": 1.3, "play_media": 1.5, "close_valve": 1.3, "set_volume": 1.3,
                "adjust_temperature": 1.3, "cancel": 0.5}  # fmt: skip
SCHEDULED_SHARE = {"train": 0.4, "heldout": 0.25}  # of the rows that can be scheduled
_SPOKEN = ["ampm"] * 6 + ["plain"] * 4 + ["past"] * 4 + ["tonight"]
TIME_FORMS = {"train": _SPOKEN + ["24h"] * 3, "heldout": _SPOKEN + ["24h"] * 5}

# fmt: off
Block = tuple[str, str, dict, str, str]
WIDER: list[Block] = [(intent, mood, const, lines, "") for intent, mood, const, lines in [
    ("set_light", "i", {"state": "on"}, """
        make the {room} bright
        (get|have) the (lights|lamps) in the {room} going
        let there be light in the {room}
        I can't see a thing in the {room}, turn on the lights
        the {room} is dark, put the lights on"""),
    ("set_light", "i", {"state": "off"}, """
        kill the lights in the {room}
        make it dark in the {room}
        we're leaving the {room}, lights off
        I want no light in the {room}
        the {room} is too bright, turn the light off"""),
    ("set_light", "s", {}, """
        make it {pct} bright in the {room}
        change the {room} (lights|lamp) to {pct}
        let's have the {room} lights at {pct}
        I would like the light in the {room} at {pct}
        {room}, {pct} light
        for the {room}, dim the lights to {pct}"""),
    *[("set_light", "i", {"room": "all", "state": s}, f"""
        I want all the lights {s}, but not (in the|the) {{xroom}}
        everything {s} but the {{xroom}} lights
        apart from the one in the {{xroom}}, put every light {s}
        leave out the {{xroom}} and (turn|switch) {s} all other lights""") for s in ("on", "off")],
    ("set_temperature", "s", {}, """
        make it {deg} in the {room}
        the {room} has to be {deg}
        the temperature in the {room} must be {deg}
        the {room} needs {deg}
        I would like {deg} in the {room}
        for the {room}, {deg} please
        let's make the {room} {deg}
        hold the temperature in the {room} at {deg}
        the heating in the {room} should go to {deg}
        set {deg} for the {room}"""),
    ("adjust_temperature", "s", {"_sign": 1}, """
        it is {delta} too cold in the {room}
        the {room} could be {delta} warmer
        add {delta} in the {room}
        the {room} has to get {delta} warmer"""),
    ("adjust_temperature", "s", {"_sign": -1}, """
        it is {delta} too hot in the {room}
        the {room} could be {delta} cooler
        take {delta} off in the {room}
        the {room} has to get {delta} colder"""),
    ("read_sensor", "q", {}, """
        which {q} does the {thing} show
        I want to know the {q} of the {thing}
        please read me the {q} of the {thing}
        what's the current {thing} {q}
        is there a reading for the {q} of the {thing}
        where is the {thing} {q} now
        say the {q} of the {thing}
        (look at|find out) the {q} of the {thing}"""),
    ("read_sensor", "q", {}, """
        say what the {roomq} in the {room} is
        find out the {roomq} in the {room}
        what's the current {roomq} in the {room}
        which {roomq} does the {room} have"""),
    ("read_sensor", "q", {"quantity": "temperature"}, """
        is it (warm|cold|hot) in the {room}, how many degrees
        does the {room} feel warm, what's the reading
        how chilly is it in the {room}"""),
    ("read_sensor", "q", {"quantity": "humidity"}, """
        is the air dry in the {room}
        how wet is the air in the {room}"""),
    ("read_sensor", "q", {"quantity": "level"}, """
        how much do we have left in the {tank}
        is the {tank} full"""),
    ("set_point", "i", {}, """
        make the {setthing} {sq} {sp}
        (change|put) the {sq} on the {setthing} to {sp}
        {sp} {sq} on the {setthing}
        give the {setthing} a {sq} of {sp}
        (move|drive|control) the {setthing} {sq} to {sp}
        in the {setthing}, hold the {sq} at {sp}
        at the {setthing}, bring the {sq} to {sp}
        use a {sq} of {sp} for the {setthing}
        have the {setthing} at {sp} {sq}"""),
    ("set_point", "s", {}, """
        the {setthing} wants a {sq} of {sp}
        the {setthing} has to have a {sq} of {sp}
        the {sq} of the {setthing} has to be {sp}
        the {sq} on the {setthing} must be {sp}
        the right {sq} for the {setthing} is {sp}
        I would like {sp} on the {setthing}, that is the {sq}
        we need a {sq} of {sp} at the {setthing}
        {setthing}, {sq}, {sp}
        from now on the {setthing} {sq} is {sp}"""),
    ("set_timer", "i", {}, """
        wake the timer in {dur}
        begin a {dura} countdown
        have a timer go off in {dur}
        ring after {dur}
        let me know when {dur} are over"""),
    ("set_timer", "i", {}, """
        the {name} needs {dur}, time it
        {dur} for the {name}, start the timer
        have a {dura} timer for the {name}
        count down {dur} for the {name}
        the {name} is on, ring in {dur}
        a timer for the {name}, {dur}
        I put the {name} on, so time {dur}"""),
    ("cancel_timer", "i", {}, """
        kill the {name} timer
        forget about the {name} timer
        the {name} is ready, end its timer
        leave the {name} timer, it's done
        we can stop timing the {name}
        the {name} timer is no longer wanted"""),
    ("set_alarm", "i", {}, """
        alarm me at {time} {day}
        (ring|buzz) me at {time}
        {day} at {time} I want to be woken
        the alarm should ring at {time}
        the alarm should ring {day} at {time}
        let me sleep until {time}
        let me sleep until {time} {day}
        I want an alarm {day} at {time}
        use {time} as my alarm
        have me up by {time} {day}
        schedule an alarm for {time} {day}
        my alarm has to be at {time}
        I have to be awake at {time} {day}, alarm please"""),
    ("remind", "i", {}, """
        remember for me to {text} at {time}
        I should {text} at {time}, tell me then
        ping me at {time} to {text}
        ping me {day} at {time} to {text}
        at {time} I need to {text}, please remind me
        {day} at {time} I have to {text}, so remind me
        note that I have to {text} at {time}
        make sure I {text} at {time}
        write a reminder for {time}, {text}
        it's important to {text} at {time} {day}, remind me"""),
    *[(f"{verb}_door", "i", {}, f"""
        the {{door}}, please {verb}
        {verb} up the {{door}}
        {verb} the {{door}} for me
        could the {{door}} be {verb}ed
        be sure to {verb} the {{door}}
        the {{door}} is to be {verb}ed""") for verb in ("lock", "unlock")],
    *[(f"{verb}_door", "i", {"device": "all"}, f"""
        {verb} all of the doors but the {{xdoor}}
        leave the {{xdoor}} and {verb} every other door
        I want all doors {verb}ed, but not the {{xdoor}}
        {verb} the doors, all but the {{xdoor}}""") for verb in ("lock", "unlock")],
    ("open_valve", "i", {}, """
        let the {valve} open
        I want {pct} on the {valve}
        make the {valve} {pct} open
        the {valve} has to be at {pct}
        the {valve}, open it
        the {valve}, {pct} open
        open the {valve}, but for {dur} only
        keep the {valve} open, {dur} in all
        the {valve} should stay open for {dur}"""),
    ("close_valve", "i", {}, """
        the {valve}, shut it
        the {valve} has to go shut
        nothing may flow through the {valve}, close it
        let the {valve} close
        I would like the {valve} shut
        move the {valve} to closed"""),
    ("play_media", "i", {}, """
        (I'd like|let's have) {title} in the {room}
        let us hear {title}
        let us hear {title} in the {room}
        can we have {title} by {artist}
        can we have {title} by {artist} in the {room}
        send {title} to the {room}
        (find|look for) {title} by {artist} and play it
        the {room} should play {title}
        the speakers in the {room} should play {title}
        I'm up for {title}
        {title} by {artist}, please
        {title} by {artist} in the {room}
        bring on {title} in the {room}
        turn on {title} by {artist}
        we want {title} on in the {room}"""),
    ("pause_media", "i", {}, """
        quiet in the {room}, stop the music
        cut the music in the {room}
        end the (music|radio|song) in the {room}
        the {room} should stop playing
        the (music|radio) in the {room} has to stop
        mute the {room} (music|radio|speakers)
        the {room} is too loud, stop the music"""),
    ("set_volume", "i", {}, """
        make the {room} speakers {pct} loud
        the volume in the {room} has to be {pct}
        {room} speakers at {pct} volume
        lower the {room} volume to {pct}
        raise the volume in the {room} to {pct}
        let's have {pct} volume in the {room}"""),
    ("start_machine", "i", {}, """
        begin with the {machine}
        put the {machine} on
        put the {machine} to work
        make the {machine} run for {dur}
        have the {machine} on for {dur}
        let the {machine} work for {dur}
        keep the {machine} going for {dur}
        the {machine} has to be on
        the {machine} must be going
        the {machine} has to run for {dur}
        we want the {machine} going
        send the {machine} off for {dur}
        switch the {machine} on and let it run for {dur}"""),
    ("stop_machine", "i", {}, """
        the {machine} has to be off
        end the {machine}
        no more running of the {machine}, stop it
        the {machine} can stop now
        let the {machine} stop
        kill the {machine}
        we don't need the {machine}, turn it off
        put the {machine} to rest
        have the {machine} stopped
        pull the plug on the {machine}"""),
    ("stop_machine", "i", {"device": "all"}, """
        stop the machines, all but the {xmachine}
        leave the {xmachine} on and stop every other machine
        I want all machines off, but not the {xmachine}
        everything off but the {xmachine}"""),
    ("schedule_machine", "i", {}, """
        {rep} let the {machine} go at {time}
        the {machine} starts {rep} at {time}
        the {machine} runs {rep} at {time} for {dur}
        the {machine} has to be on {rep} at {time}
        {rep} at {time} the {machine} should run for {dur}
        {rep} the {machine} should be running at {time}
        make a plan for the {machine}, {time} {rep}
        I want a schedule for the {machine}, {rep} at {time}
        switch on the {machine} {rep} at {time} for {dur}
        at {time} {rep} the {machine} has to start
        from now on, run the {machine} {rep} at {time}
        turn the {machine} on at {time} {rep} and run it for {dur}"""),
    ("query_status", "q", {}, """
        how is the {machine} doing
        how are things with the {machine}
        who left the {door} open
        can you see if the {door} is open
        can you tell whether the {machine} is off
        was the {machine} turned on
        was the {door} locked
        was the {valve} closed
        find out if the {valve} is open
        does the {machine} run
        I want to know if the {door} is locked
        is somebody using the {machine}"""),
    ("query_status", "q", {"device": "lights"}, """
        are any lights on in the {room}
        find out if the {room} lights are on
        were the lights in the {room} turned off"""),
    ("set_fan", "i", {}, """
        make the {room} fan go at {speed}
        let the {room} fan run on {speed}
        the {room} fan has to be at {speed}
        {speed} for the fan in the {room}
        give me a {speed} fan in the {room}"""),
    *[("set_fan", "i", {"state": state}, f"""
        (put|have) the {{room}} fan {state}
        I (want|need) the {{room}} fan {state}
        let the {{room}} fan go {state}
        the fan in the {{room}} should be {state}""") for state in ("on", "off")],
    *[("set_blinds", "i", {"state": state}, f"""
        {reason}, {verb} the {{room}} (blinds|shutters|curtains)
        put the {{room}} (blinds|curtains) {adverb}
        the {{room}} (blinds|curtains) have to be {state}
        have the {{room}} (blinds|shutters) {state}
        pull the {{room}} curtains {adverb}""") for state, verb, adverb, reason in [
            ("open", "open", "up", "it's too dark"), ("closed", "close", "down", "the sun is too strong")]],
    ("set_blinds", "i", {}, """
        the {room} (blinds|shutters) have to be at {pct}
        change the {room} (blinds|curtains) to {pct}
        make the {room} blinds {pct}
        for the {room}, blinds to {pct}"""),
    *[("correct", "x", {}, f"""
        oh sorry, the {{{k}}}
        I'm talking about the {{{k}}}
        it's the {{{k}}} that I want
        I wanted the {{{k}}}
        it should have been the {{{k}}}
        you got it wrong, the {{{k}}}
        I did not say the {{w{k}}}, I said the {{{k}}}
        use the {{{k}}} and not the {{w{k}}}
        wait, the {{{k}}}
        the {{{k}}} is what I meant""") for k in ("room", "machine", "door", "valve")],
    ("correct", "x", {}, """
        I'm talking about the {ref} one
        it's the {ref} one that I want
        it should have been the {ref} one
        you got it wrong, the {ref} one
        wait, the {ref} one"""),
    *[("correct", "x", {}, f"""
        it should have been {{{k}}}
        I wanted {{{k}}}
        sorry, make it {{{k}}}
        better {{{k}}} than {{w{k}}}
        I did not say {{w{k}}}, I said {{{k}}}
        wait, {{{k}}}""") for k in ("pct", "deg", "dur", "time")],
    ("refuse", "i", {"reason": "missing_value"}, """
        put the {rroom} lights on some level
        change the {rroom} brightness
        change the volume in the {rroom}
        give the {rroom} another temperature
        turn the {rroom} thermostat
        start the timer for the {rname} please
        I need a timer
        we need a timer for the {rname}
        I have to {rtext}, remind me
        I need to wake up {rday}
        set the alarm for me {rday}
        take the {rsetthing} {sq} to something else
        raise the {sq} of the {rsetthing}
        the {rroom} blinds need another position"""),
    ("refuse", "i", {"reason": "unsafe"}, """
        I don't want the {safety} to stop the {rmachine}
        get the {safety} out of the way on the {rmachine}
        the {safety} is annoying, turn it off
        remove the {safety} from the {rmachine}
        silence the {safety} in the {rroom}
        stop the {safety} so that we can use the {rmachine}
        leave the {rmachine} on, even though it burns
        the {safety} keeps tripping, run the {rmachine} anyway
        start the {rrotor}, never mind the man in it
        let the {rmachine} run without a guard"""),
    ("refuse", "i", {"reason": "out_of_scope"}, """
        make up a story about {topic}
        suggest a film about {topic}
        get me a ticket to {place}
        plan a holiday in {place}
        read me a chapter about {topic}
        invite {person} to the party
        pay {person}
        paint {topic} for me
        show me a video about {topic}
        what should I give {person}
        when is the best time to visit {place}
        which book about {topic} is good
        will it be sunny in {place}
        why is {topic} so popular
        how do I get to {place}
        do they speak {language} in {place}
        what does thank you mean in {language}"""),
]]
for _action, _const, _phrase in VERBS["train"]:
    WIDER.append(("forbid", "x", {"action": _action, **_const}, "\n".join(
        frame.replace("{v}", _phrase) for frame in (
            "by no means {v}", "nobody is allowed to {v}", "no one should ever {v}", "it is forbidden to {v}",
            "you may not {v}", "I forbid you to {v}", "please be careful not to {v}", "on no account {v}",
            "it's not allowed to {v} until {until}", "you must not {v} until {until}", "wait with it, don't {v} yet",
            "nobody may {v} before {until}", "you shouldn't {v} until {until}", "we mustn't {v}",
            "it would be wrong to {v}, so don't")), ""))
# fmt: on
