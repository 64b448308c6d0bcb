"""The second half of the command templates: media, machines, fans, corrections and refusals."""

from __future__ import annotations

from commands_frames import FORBID, VERBS
from commands_grammar import ALL_BUT

# fmt: off
MORE_BLOCKS: list[tuple[str, str, dict, str, str]] = [
    ("play_media", "i", {}, """
        play {title}
        play {title} in the {room}
        (play|put on|start) {title} by {artist}
        (play|put on) {title} by {artist} in the {room}
        (put on|start|start playing) {title}
        (put on|start|start playing) {title} in the {room}
        in the {room}, play {title}
        play (the song|the album|the track) {title}
        play me {title}""", """
        let me hear {title} by {artist}
        stream {title} to the {room}
        give us {title} on the {room} speakers
        get {title} playing in the {room}"""),
    ("play_media", "s", {}, """
        I (want|would like) to (hear|listen to) {title}
        I (want|would like) to (hear|listen to) {title} in the {room}
        I (want|would like) to hear {title} by {artist}
        {title} in the {room}, please play it
        I feel like listening to {title}""", """
        I'm in the mood for {title} by {artist}
        how about {title} by {artist} in the {room}
        we'd love to hear {title} in the {room}"""),
    ("pause_media", "i", {}, """
        (pause|stop|hold) the (music|song|sound|radio|playback) in the {room}
        (pause|stop) the {room} (music|radio|speaker)
        (pause|stop) (playing|the player) in the {room}
        in the {room}, (pause|stop) the (music|radio)
        (turn|switch) off the (music|radio) in the {room}
        make the music stop in the {room}""", """
        halt the music in the {room}
        quit playing music in the {room}
        let the radio in the {room} pause
        silence the music in the {room}"""),
    ("pause_media", "s", {}, """
        no more music in the {room}
        I want the music in the {room} (paused|stopped)
        {room} music off
        stop it with the music in the {room}""", """
        I'd like the music in the {room} to stop
        enough music in the {room}"""),
    ("set_volume", "i", {}, """
        (set|turn|change|bring) the volume in the {room} to {pct}
        (set|turn|change) the {room} volume to {pct}
        (turn|set) the (music|radio|speaker|sound) in the {room} (up|down|) to {pct}
        turn (up|down) the (music|radio) in the {room} to {pct}
        (put|have) the {room} (speaker|music|radio) at {pct} (volume|)
        make the {room} volume {pct}
        in the {room}, set the volume to {pct}""", """
        adjust the volume in the {room} to {pct}
        let the music in the {room} play at {pct} volume
        take the {room} speaker volume to {pct}"""),
    ("set_volume", "s", {}, """
        volume (at|to) {pct} in the {room}
        {room} volume (at|to|) {pct}
        {pct} volume in the {room}
        I want the volume in the {room} at {pct}
        the music in the {room} should be at {pct} volume""", """
        I'd like {pct} volume in the {room}
        the {room} volume needs to be {pct}"""),
    ("start_machine", "i", {}, """
        start (up|) the {machine}
        (turn|switch) on the {machine}
        (turn|switch) the {machine} on
        (run|start) the {machine} for {dur}
        (turn|switch) on the {machine} for {dur}
        (fire|power) up the {machine}
        get the {machine} (going|running)
        let the {machine} run
        for {dur}, run the {machine}
        (activate|launch) the {machine}""", """
        set the {machine} running for {dur}
        bring the {machine} online
        kick off the {machine}
        have the {machine} work for {dur}"""),
    ("start_machine", "s", {}, """
        {machine} on
        {machine} on for {dur}
        I (want|need) the {machine} (on|running|to run)
        I (want|need) the {machine} to run for {dur}
        the {machine} should (run|be running|be on)
        time to start the {machine}""", """
        I'd like the {machine} started
        the {machine} needs to run for {dur}
        we need the {machine} to be running"""),
    ("stop_machine", "i", {}, """
        stop the {machine}
        (turn|switch) off the {machine}
        (turn|switch) the {machine} off
        (shut|power) down the {machine}
        (halt|deactivate) the {machine}
        shut off the {machine}
        make the {machine} stop
        bring the {machine} to a stop""", """
        take the {machine} offline
        cut the power to the {machine}
        get the {machine} to stop
        get the {machine} shut down"""),
    ("stop_machine", "s", {}, """
        {machine} off
        I (want|need) the {machine} (off|stopped)
        the {machine} (should|must|has to) stop
        the {machine} (should|must) be off
        time to stop the {machine}
        that's enough, stop the {machine}""", """
        I'd like the {machine} stopped
        the {machine} needs to be off
        we have to shut the {machine} down"""),
    ("stop_machine", "i", {"device": "all"}, f"""
        (stop|shut down) (everything|all machines|every machine|all the machines) {ALL_BUT} the {{xmachine}}
        (turn|switch) off (all machines|every machine) {ALL_BUT} the {{xmachine}}
        (except for|apart from) the {{xmachine}}, stop (every machine|all machines)""", """
        stop all machines other than the {xmachine}
        with the exception of the {xmachine}, shut down all machines
        stop every machine, only not the {xmachine}"""),
    ("schedule_machine", "i", {}, """
        (run|start|turn on|switch on) the {machine} {rep} at {time}
        {rep} at {time}, (run|start|turn on) the {machine}
        at {time} {rep}, (run|start) the {machine}
        (run|start) the {machine} at {time} {rep}
        run the {machine} {rep} at {time} for {dur}
        run the {machine} for {dur} {rep} at {time}
        schedule the {machine} {rep} at {time}
        (schedule|plan) the {machine} for {time} {rep}
        (schedule|plan) the {machine} to (run|start) {rep} at {time}
        {rep}, start the {machine} at {time}""", """
        let the {machine} run at {time} {rep}
        set up the {machine} to start {rep} at {time}
        have the {machine} go on {rep} at {time} for {dur}
        put the {machine} on a schedule, {rep} at {time}"""),
    ("schedule_machine", "s", {}, """
        the {machine} should (run|start) {rep} at {time}
        I want the {machine} to (run|start) {rep} at {time}
        {machine} on {rep} at {time}
        the {machine} should run {rep} at {time} for {dur}""", """
        I'd like the {machine} to come on at {time} {rep}
        the {machine} needs to run for {dur} {rep} at {time}
        {rep} the {machine} has to start at {time}"""),
    ("query_status", "q", {}, """
        is the {machine} (on|running|still running|working|off|stopped)
        is the {door} (locked|unlocked|open|closed|still open)
        is the {valve} (open|closed|shut|still open)
        what is the status of the {machine}
        what's the (status|state) of the {machine}
        what's the (status|state) of the {door}
        (check|show|get|tell me) the status of the {valve}
        (check|show|get|tell me) the status of the {machine}
        (check|tell me) (if|whether) the {machine} is (on|running)
        (check|tell me) (if|whether) the {door} is (locked|open)
        did (someone|anyone|I|we) (lock|close) the {door}
        did (someone|anyone|I|we) (start|stop) the {machine}
        did (someone|anyone|I|we) (open|close) the {valve}""", """
        has the {machine} been switched on
        what is the {machine} doing
        has anybody locked the {door}
        could you see whether the {valve} is closed
        what state is the {machine} in
        do you know if the {door} is closed"""),
    ("query_status", "q", {"device": "lights"}, """
        are the lights (on|off|still on) in the {room}
        are the {room} lights (on|off|still on)
        (check|tell me) (if|whether) the lights are on in the {room}
        did (someone|I|we) (turn|switch) off the {room} lights""", """
        has anybody left the lights on in the {room}
        do you know if the {room} lights are off"""),
    ("set_fan", "i", {}, """
        (set|turn|switch|put) the {room} fan to {speed}
        (set|turn|switch|put) the fan in the {room} to {speed}
        (run|keep|have) the {room} fan at {speed} speed
        (run|put) the {room} fan on {speed}
        run the fan in the {room} (on|at) {speed}
        change the fan speed in the {room} to {speed}""", """
        adjust the {room} fan to {speed} speed
        let the fan in the {room} spin at {speed}
        get the {room} fan to {speed}
        in the {room}, make the fan {speed}"""),
    ("set_fan", "s", {}, """
        {room} fan (to|on|at) {speed}
        {speed} speed for the {room} fan
        I want the {room} fan (on|at) {speed}
        the fan in the {room} should be on {speed}""", """
        I'd like the {room} fan at {speed}
        the {room} fan needs to run on {speed}"""),
    *[("set_fan", "i", {"state": state}, f"""
        (turn|switch) {state} the {{room}} fan
        (turn|switch) the {{room}} fan {state}
        (turn|switch) {state} the fan in the {{room}}
        (turn|switch) the fan in the {{room}} {state}
        {{room}} fan {state}""", f"""
        get the {{room}} fan {state}
        have the fan in the {{room}} go {state}""") for state in ("on", "off")],
    *[("set_blinds", "i", {"state": state}, f"""
        ({verbs}) the {{room}} (blinds|shutters|curtains)
        ({verbs}) the (blinds|shutters|curtains) in the {{room}}
        in the {{room}}, ({verbs}) the (blinds|curtains)
        (make sure|see that) the {{room}} (blinds|curtains) are {state}
        {{room}} (blinds|shutters|curtains) {state}
        I (want|need) the {{room}} (blinds|shutters) {state}""", held) for state, verbs, held in [
            ("open", "open|open up|raise", """
                let some daylight into the {room}, open the blinds
                get the {room} blinds open
                have the curtains in the {room} opened"""),
            ("closed", "close|shut|lower", """
                keep the sun out of the {room}, close the blinds
                get the {room} blinds closed
                have the curtains in the {room} drawn closed""")]],
    ("set_blinds", "i", {}, """
        (set|bring|move) the {room} (blinds|shutters|curtains) to {pct}
        (set|bring|move) the (blinds|shutters|curtains) in the {room} to {pct}
        put the {room} (blinds|shutters) at {pct}
        {room} (blinds|shutters|curtains) (to|at) {pct}
        I want the {room} blinds at {pct}""", """
        adjust the {room} blinds to {pct}
        in the {room}, have the blinds at {pct}
        let the {room} shutters go to {pct}"""),
    *[("correct", "x", {}, train, held) for train, held in [
        ("""no, the {ref} one
            (no,|) not that one, the {ref} one
            (no,|sorry,|) I (meant|mean) the {ref} one
            (wrong one,|that's wrong,) (take|I meant|I want) the {ref} one
            no, (take|use) the {ref} one
            (sorry,|actually,) the {ref} one
            the {ref} one, not (this|that) one
            (no,|) I said the {ref} one""", """
            oh no, it was the {ref} one
            that isn't the one, use the {ref} one
            I was talking about the {ref} one
            nope, the {ref} one instead"""),
        *[(f"""no, the {{{k}}}
            (no,|sorry,|) I (meant|mean) the {{{k}}}
            (no,|sorry,|) not the {{w{k}}}, the {{{k}}}
            (no,|) the {{{k}}}, not the {{w{k}}}
            that's wrong, (the|I meant the) {{{k}}}
            I said the {{{k}}}
            (no,|) (take|make it) the {{{k}}} instead
            sorry, the {{{k}}}
            I (meant|said) the {{{k}}}, not the {{w{k}}}""", f"""
            oh no, it was the {{{k}}}
            I was talking about the {{{k}}}
            nope, the {{{k}}} instead
            I didn't mean the {{w{k}}}, I meant the {{{k}}}""") for k in ("room", "machine", "door", "valve")],
        *[(f"""no, {{{k}}}
            (no,|sorry,|) I (meant|said) {{{k}}}
            (no,|sorry,|) not {{w{k}}}, {{{k}}}
            (no,|) make (that|it) {{{k}}}
            (no,|) make (that|it) {{{k}}} instead
            change (that|it) to {{{k}}}
            that's wrong, {{{k}}}
            (no,|) {{{k}}}, not {{w{k}}}""", f"""
            it was supposed to be {{{k}}}
            nope, {{{k}}} instead
            I didn't mean {{w{k}}}, I meant {{{k}}}
            let's make that {{{k}}}""") for k in ("pct", "deg", "dur", "time")]]],
    ("cancel", "x", {"ref": "last"}, """
        (no,|sorry,|ok,|please|actually,|hey,|wait,|) (cancel|undo|forget|revert|drop|stop) that (please|now|again|)
        (no,|sorry,|ok,|please|actually,|) (cancel|undo|forget|revert) (it|the last one|the last command) (please|)
        (no,|please|ok,|) forget what I said
        (oh|ok|sorry|no|please) never mind
        never mind (that|what I said|the last one|the last command)
        I don't want that (after all|anymore|any more)
        (sorry,|) I didn't mean that""", """
        (no,|sorry,|please|) take that back
        (no,|please|) scrap my last command
        disregard (my last request|what I just said)
        I changed my mind, undo the last one
        please call that off
        ignore what I just asked for"""),
    ("refuse", "i", {"reason": "out_of_scope"}, """
        write (me|) a (poem|song|letter|short story) about {topic}
        (tell|give) me a (joke|fact|story) about {topic}
        explain {topic} to me
        (give me|write) a summary of {topic}
        translate {topic} into {language}
        teach me some {language}
        book a (flight|train|trip) to {place}
        send an email to {person}
        (call|text|phone) {person}
        order (a pizza|some flowers|a taxi|new shoes) for {person}
        help me with my (homework|taxes|essay) about {topic}
        draw a picture of {topic}
        find a (hotel|restaurant|job) in {place}
        write python code (that sorts a list|for a website|to add two numbers)
        buy two tickets to {place}
        tell me the news from {place}""", """
        compose a haiku about {topic}
        recommend a good book about {topic}
        reserve a table at a restaurant in {place}
        post a photo for {person} online
        pay the bill from {person}
        find me a cheap hotel in {place}
        write a speech about {topic} for {person}
        prepare a slide show about {topic}"""),
    ("refuse", "q", {"reason": "out_of_scope"}, """
        what's the capital of {place}
        what's the weather in {place}
        who (won the match|is the president|is the mayor) in {place}
        what do you think about {topic}
        how far is it to {place}
        how many people live in {place}
        what does {person} want for dinner
        can you sing a song about {topic}
        who invented (the telephone|the wheel|paper|glass)
        what is (the meaning of life|love|the stock price|the exchange rate) (today|)
        should I (buy|sell) a car in {place}
        where can I (eat|swim|study) in {place}
        do you (like|know much about) {topic}""", """
        when did people first live in {place}
        what's a good present for {person}
        who wrote the best book on {topic}
        which museum should I visit in {place}
        is it going to rain in {place}
        what language do they speak in {place}
        how do you say good morning in {language}
        why are people interested in {topic}"""),
    ("refuse", "i", {"reason": "missing_value"}, """
        (set|change) the temperature in the {rroom}
        (set|change) the {rroom} (temperature|thermostat)
        (dim|set) the {rroom} (lights|lamp)
        (set|dim) the {rroom} lights to a (nice|good) level
        set the (volume|brightness) in the {rroom}
        (set|change) the {rsetthing} {sq}
        (set|change) the {sq} of the {rsetthing}
        (set|start) a timer
        (set|start) a timer for the {rname}
        (set|start) a {rname} timer
        (set|make|put in) an alarm {rday}
        wake me up {rday}
        remind me to {rtext}
        remind me to {rtext} {rday}
        (set|put) the {rroom} blinds to a (better|different) position
        bring the {rroom} to a (good|nice) temperature""", """
        adjust the {rroom} thermostat
        adjust the volume in the {rroom}
        dim the lamp in the {rroom}
        get a timer going for the {rname}
        {rday} I need an alarm
        make a reminder to {rtext}
        adjust the {rsetthing} {sq}
        bring the {rroom} lights to a good level"""),
    ("refuse", "i", {"reason": "unsafe"}, """
        (disable|bypass|override|turn off|switch off) the {safety}
        (disable|bypass|override|turn off) the {safety} (in the {rroom}|on the {rmachine})
        (disconnect|mute|block|jam|deactivate) the {safety} (in the {rroom}|on the {rmachine}|)
        (run|start) the {rmachine} without the {safety}
        (run|start) the {rmachine} with the (guard|door|cover) open
        (run|start) the {rrotor} while (someone|a worker|the mechanic) is inside
        keep the {rmachine} running (even though it is overheating|while it leaks gas|while it is smoking)
        ignore the {safety} and (start|run) the {rmachine}
        (run|push) the {rmachine} (above|past|over) its safe limit
        start the {rmachine} although the {safety} (tripped|is broken|is off)""", """
        shut off the {safety} so the {rmachine} can run
        make the {safety} stop working in the {rroom}
        take the {safety} out of service on the {rmachine}
        start the {rmachine} even if the {safety} says no
        start the {rrotor} while a person is still in it
        run the {rmachine} with its safety cover removed
        cheat the {safety} on the {rmachine}"""),
]
# fmt: on
for _split, _verbs in VERBS.items():
    for _action, _const, _phrase in _verbs:
        _lines = "\n".join(frame.replace("{v}", _phrase) for frame in FORBID[_split])
        MORE_BLOCKS.append(
            (
                "forbid",
                "x",
                {"action": _action, **_const},
                _lines if _split == "train" else "",
                _lines if _split == "heldout" else "",
            )
        )
