"""What is said around a command template: politeness, schedules, repairs, contrasts and prohibitions."""

from __future__ import annotations

# fmt: off
# What politeness, time and repair phrases may be put around a template.
PREFIX = {
    "train": {"i": ["please", "please", "could you", "can you", "would you", "can you please", "I want you to",
                    "I'd like you to", "I need you to", "go ahead and", "hey,", "ok,", "hello,", "now", "kindly",
                    "would you kindly", "I would like you to", "be a dear and", "just", "next,", "quickly",
                    "we need you to", "would you be able to", "listen up,"],
              "q": ["hey,", "ok,", "tell me,", "quick question,", "please tell me,", "say,", "one question,",
                    "I wonder,", "excuse me,", "now,"],
              "s": ["ok,", "hey,", "so,", "well,", "now,", "please,"]},
    "heldout": {"i": ["do me a favour and", "be so kind and", "right,", "I'd love you to", "could you quickly"],
                "q": ["just wondering,", "let me know,", "right,"], "s": ["right,", "listen,"]},
}
SUFFIX = {"train": ["please", "please", ", please", ", thanks", ", thank you", ", if you can", ", will you", "for me",
                    ", that would be nice", ", ok", "now please"],
          "heldout": [", if that's okay", ", cheers", ", many thanks", ", please"]}
SCHEDULE = {
    "train": ["{c} at {time}", "{c} at {time}", "at {time}, {c}", "{c} at {time} {day}", "{day} at {time}, {c}",
              "{c} in {delay}", "in {delay}, {c}", "{c} {day} at {time}", "at {time} and not before, {c}",
              "{c}, {day} at {time}", "as of {time}, {c}", "it should happen at {time}, {c}", "{c} after {delay}",
              "after {delay}, {c}", "{delay} later, {c}", "{c} once it is {time}", "{c} {day}, at {time}",
              "give it {delay}, then {c}", "{c} when {delay} have gone by"],
    "heldout": ["{c} at exactly {time}", "when it is {time}, {c}", "{c} {delay} from now", "wait {delay} and then {c}",
                "at {time} {day}, {c}", "{day}, at {time} sharp, {c}"],
}
SCHEDULED = {"set_light", "set_temperature", "start_machine", "stop_machine", "open_valve", "close_valve", "lock_door",
             "unlock_door", "set_blinds", "set_fan", "set_point", "set_volume"}
REPAIR = {"train": ["no", "sorry", "no wait", "wait, no", "I mean", "sorry, I mean", "actually", "or rather",
                    "no, make that", "no, I want", "wait, make that", "well, no", "I'm sorry, I want", "pardon",
                    "wrong", "I take that back", "let me see, no", "not quite"],
          "heldout": ["no, sorry", "hold on, no", "oops", "correction", "my mistake", "er, no", "no, I meant"]}
CONTRAST = {"train": ["{c}, not the {w}", "{c}, but not the {w}", "{c} rather than the {w}"],
            "heldout": ["{c}, and not the {w}", "{c} and leave the {w} alone", "{c}, definitely not the {w}"]}
REPLACES = {"train": ["cancel that, {c}", "cancel that and {c} instead", "forget that, {c}", "never mind that, {c}",
                      "drop that and {c}", "cancel the last one, {c}", "forget the last command and {c}",
                      "instead of that, {c}", "no, forget it, {c} instead", "never mind what I said, {c}",
                      "that was wrong, {c} instead", "I changed my mind, {c}", "skip the last one and {c}",
                      "don't do that, {c}", "revert that and {c}"],
            "heldout": ["undo that and {c} instead", "cancel my last request, {c}", "forget what I just said, {c}",
                        "scrap that, {c}", "take that back and {c}"]}
REPLACING = {"set_light", "set_temperature", "start_machine", "stop_machine", "open_valve", "close_valve", "lock_door",
             "play_media", "set_blinds", "set_fan", "set_timer", "set_alarm"}

VERBS = {  # what may be forbidden: (action, constant slots, verb phrase)
    "train": [("start_machine", {}, "(start|run|turn on|switch on|start up) the {machine}"),
              ("stop_machine", {}, "(stop|turn off|switch off|shut down) the {machine}"),
              ("open_valve", {}, "(open|open up) the {valve}"), ("close_valve", {}, "(close|shut) the {valve}"),
              ("lock_door", {}, "lock the {door}"), ("unlock_door", {}, "unlock the {door}"),
              ("set_light", {"state": "on"}, "(turn|switch) on the {room} (lights|light)"),
              ("set_light", {"state": "off"}, "(turn|switch) off the {room} (lights|light)"),
              ("set_blinds", {"state": "open"}, "open the {room} (blinds|curtains)"),
              ("set_blinds", {"state": "closed"}, "close the {room} (blinds|curtains)")],
    "heldout": [("start_machine", {}, "(start|turn on) the {machine}"),
                ("stop_machine", {}, "(stop|turn off) the {machine}"),
                ("open_valve", {}, "open the {valve}"), ("close_valve", {}, "close the {valve}"),
                ("lock_door", {}, "lock the {door}"), ("unlock_door", {}, "unlock the {door}"),
                ("set_light", {"state": "on"}, "switch on the {room} lights"),
                ("set_light", {"state": "off"}, "switch off the {room} lights"),
                ("set_blinds", {"state": "open"}, "open the {room} blinds"),
                ("set_blinds", {"state": "closed"}, "close the {room} blinds")],
}
FORBID = {
    "train": ["don't {v}", "do not {v}", "never {v}", "(please|) don't {v} yet", "don't ever {v}",
              "don't {v} before {until}",
              "do not {v} before {until}", "don't {v} until {until}", "you must not {v}", "(please|) do not {v} at all",
              "whatever you do, don't {v}", "you should not {v}", "I don't want you to {v}", "nobody should {v}",
              "until {until}, don't {v}"],
    "heldout": ["under no circumstances {v}", "make sure you don't {v}", "you are not allowed to {v}", "no one may {v}",
                "I'd rather you didn't {v}", "before {until}, do not {v}", "you can't {v} until {until}"],
}
