"""Units, currencies and scale words that stand beside the number of an answer."""

import re
from fractions import Fraction

_F = Fraction
_TABLE: tuple[tuple[str, str, Fraction], ...] = (
    ("length", "mm millimeter millimetre", _F(1, 1000)),
    ("length", "cm centimeter centimetre", _F(1, 100)),
    ("length", "dm decimeter decimetre", _F(1, 10)),
    ("length", "m meter metre", _F(1)),
    ("length", "km kilometer kilometre", _F(1000)),
    ("length", "in inch inches", _F(254, 10000)),
    ("length", "ft foot feet", _F(3048, 10000)),
    ("length", "yd yard", _F(9144, 10000)),
    ("length", "mi mile", _F(1609344, 1000)),
    ("mass", "mg milligram", _F(1, 1000)),
    ("mass", "g gram gm", _F(1)),
    ("mass", "kg kilogram", _F(1000)),
    ("mass", "lb lbs pound", _F(45359237, 100000)),
    ("mass", "oz ounce", _F(45359237, 1600000)),
    ("mass", "t ton tonne", _F(1000000)),
    ("volume", "ml milliliter millilitre", _F(1, 1000)),
    ("volume", "cl centiliter centilitre", _F(1, 100)),
    ("volume", "l liter litre", _F(1)),
    ("time", "ms millisecond", _F(1, 1000)),
    ("time", "s sec second", _F(1)),
    ("time", "min minute", _F(60)),
    ("time", "h hr hour", _F(3600)),
    ("time", "d day", _F(86400)),
    ("time", "week", _F(604800)),
    ("dollar", "dollar usd", _F(1)),
    ("dollar", "cent ¢", _F(1, 100)),
    ("euro", "euro eur", _F(1)),
    ("pound sterling", "gbp", _F(1)),
    ("yen", "yen jpy", _F(1)),
    ("rupee", "rupee rs inr", _F(1)),
    ("speed", "mph", _F(1609344, 3600000)),
    ("speed", "kph kmph kmh", _F(1000, 3600)),
    ("force", "N newton", _F(1)),
    ("energy", "J joule", _F(1)),
    ("energy", "kJ kilojoule", _F(1000)),
    ("power", "W watt", _F(1)),
    ("power", "kW kilowatt", _F(1000)),
    ("frequency", "Hz hertz", _F(1)),
    ("voltage", "V volt", _F(1)),
    ("current", "A ampere", _F(1)),
    ("resistance", "ohm", _F(1)),
    ("pressure", "Pa pascal", _F(1)),
    ("amount", "mol mole", _F(1)),
    ("temperature", "K kelvin", _F(1)),
)
UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, factor) for dimension, names, factor in _TABLE for name in names.split()
}
"""Symbol or singular name -> dimension, size in the dimension's base unit."""
ABBREVIATIONS = tuple(sorted((name for name in UNITS if len(name) <= 3), key=len, reverse=True))  # fmt: skip
CURRENCIES = {"¤": "dollar", "$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"} | {
    "USD": "dollar", "US¤": "dollar", "EUR": "euro", "GBP": "pound sterling", "JPY": "yen", "INR": "rupee",
    "Rs.": "rupee", "Rs": "rupee",
}  # fmt: skip
"""What is written before or behind an amount -> its dimension."""
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PER = re.compile(r"\s*/\s*|\s+per\s+|\s+an?\s+")
_POWER = re.compile(r"(?:(square|sq|cubic|cu)\.?\s+)?(.+?)\s*\^?\s*\{?\s*(-?[1-9])?\s*\}?")

Dimension = tuple[tuple[str, int], ...]


def singular(word: str) -> str:
    """The word without the ending of its plural; units of one or two letters as they are."""
    if len(word) <= 3:
        return word
    folded = word.casefold()
    if folded.endswith("ies") and len(folded) > 4:
        return folded[:-3] + "y"
    if folded.endswith(("ches", "shes", "xes", "sses")):
        return folded[:-2]
    return folded[:-1] if folded.endswith("s") and not folded.endswith("ss") else folded


def dimension_of(unit: str) -> tuple[Dimension, Fraction] | None:
    """The dimension and size of a unit such as `km/h`, `square meters`, `cm^{2}`; None for a word that is in no table.

    >>> dimension_of("square cm"), dimension_of("apples")
    (((('length', 2),), Fraction(1, 10000)), None)
    """
    powers: dict[str, int] = {}
    size = Fraction(1)
    for number, part in enumerate(_PER.split(unit.strip())):
        match = _POWER.fullmatch(part.strip())
        if match is None:
            return None
        known = UNITS.get(match[2]) or UNITS.get(singular(match[2])) or UNITS.get(match[2].casefold())
        if known is None:
            return None
        power = int(match[3] or {"s": 2, "c": 3}.get((match[1] or " ")[0], 1))
        power = -power if number else power
        powers[known[0]] = powers.get(known[0], 0) + power
        size *= known[1] ** power
    if "volume" in powers:  # litres are cubic decimetres
        cubes = powers.pop("volume")
        powers["length"] = powers.get("length", 0) + 3 * cubes
        size *= Fraction(1, 1000) ** cubes
    if "speed" in powers:
        speeds = powers.pop("speed")
        powers["length"], powers["time"] = powers.get("length", 0) + speeds, powers.get("time", 0) - speeds
    return tuple(sorted((name, power) for name, power in powers.items() if power)), size
