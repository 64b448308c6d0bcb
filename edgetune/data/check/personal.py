"""What looks like personal data or a secret: e-mail addresses, phone numbers, card numbers, keys.

A pattern sees form, not meaning: a hit is to be looked at, and no hit proves nothing.
"""

from __future__ import annotations

import re

# Card numbers before phone numbers, and each hit masked before the next kind is looked for: no digit counts twice.
PATTERNS: dict[str, re.Pattern[str]] = {
    "key": re.compile(
        r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"
        r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"  # AWS
        r"|\bAIza[0-9A-Za-z_-]{35}"  # Google
        r"|\bgh[oprsu]_[0-9A-Za-z]{36,}"  # GitHub
        r"|\bxox[abprs]-[0-9A-Za-z-]{10,}"  # Slack
        r"|\bsk-[0-9A-Za-z_-]{20,}"  # OpenAI and others
        r"|\bhf_[0-9A-Za-z]{30,}"  # Hugging Face
        r"|\beyJ[0-9A-Za-z_-]{8,}\.eyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}"  # a JSON web token
    ),
    "e-mail": re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b"),
    "card": re.compile(r"(?<![\d.])(?:\d[ -]?){12,18}\d(?![\d.]*\d)"),
    "phone": re.compile(
        r"(?<![\w.])(?:\+|00)[1-9]\d{0,2}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d(?:[ ./-]?\d){6,11}(?!\w)"  # with a country
        r"|(?<![\w.])\(?0?[1-9]\d{2}\)?[ .-]\d{3}[ .-]\d{4}(?!\w)"  # 3-3-4, with separators
        r"|(?<![\w.])0[1-9]\d{1,4}[ /-]\d{5,8}(?!\w)"  # area code and number
    ),
}


def find(text: str) -> list[str]:
    """Name the kinds of personal data that a text seems to hold, each once."""
    return mask(text)[1]


def mask(text: str) -> tuple[str, list[str]]:
    """Replace what looks like personal data by its kind in brackets; gives the text and the kinds."""
    kinds: list[str] = []
    for kind, pattern in PATTERNS.items():

        def replace(match: re.Match[str], kind: str = kind) -> str:
            if kind == "card" and not luhn(match[0]):
                return match[0]
            if kind not in kinds:
                kinds.append(kind)
            return f"[{kind}]"

        text = pattern.sub(replace, text)
    return text, kinds


def luhn(number: str) -> bool:
    """The check digit of card numbers (ISO/IEC 7812-1); a number of one digit repeated is none."""
    digits = [int(digit) for digit in number if digit.isdigit()]
    doubled = [d if i % 2 == 0 else 2 * d - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return len(set(digits)) > 1 and sum(doubled) % 10 == 0
