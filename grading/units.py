r"""Units, and the words after a number that change it: `5 km` is `5000 m`, `5 million` is not 5."""

import functools
import re
from collections import Counter
from fractions import Fraction

from grading.notation import rewrite

# The names of each unit, its size in a base unit, the base unit; # multiplies the number. The first
# to claim a name has it: ms is not several m.
UNITS = """ms millisecond 0.001 s
|mm millimeter millimetre 0.001 m|cm centimeter centimetre 0.01 m|dm 0.1 m
|m meter metre 1 m|km kilometer kilometre 1000 m|in inch inches 1 in|ft foot feet 12 in
|yd yard 36 in|mi mile 63360 in|s sec second 1 s|min minute 60 s
|h hr hour 3600 s|day 86400 s|week 604800 s|month 1 month|yr year 12 month|decade 120 month
|century centuries 1200 month
|mg milligram 0.001 g|g gram gm 1 g|kg kilogram 1000 g|ton tonne 1000000 g|oz ounce 1 oz
|lb pound 16 oz|ml milliliter millilitre 0.001 l|l liter litre 1 l|cup 1 cup|pint 2 cup
|quart 4 cup|gal gallon 16 cup|$ dollar us usd buck 1 $|¢ cent 0.01 $|€ euro eur 1 €|£ gbp 1 £
|₹ rs rupee inr 1 ₹|元 yuan rmb 1 元|¥ yen 1 ¥|'' arcsecond 1/3600 deg|' arcminute 1/60 deg
|degree deg 1 deg|rad radian 1 rad|celsius C 1 celsius|fahrenheit F 1 fahrenheit|kelvin 1 kelvin
|% percent pct percentage 1/100 %|N newton 1 N|J joule 1 J|kj kilojoule 1000 J|W watt 1 W|kw 1000 W
|V volt 1 V|A amp ampere 1 A|pa pascal 1 pa|hz hertz 1 hz|mol mole 1 mol|ohm 1 ohm|acre 1 acre
|calorie cal 1 cal|ev 1 ev|erg 1 erg|angstrom 1 angstrom|knot 1 knot|hundred 100 #
|thousand k K 1000 #|lakh 100000 #|million M 1000000 #|crore 10000000 #|billion B 1000000000 #
|trillion 1000000000000 #|dozen 12 #|score 20 #|gross 144 #|half halve 1/2 #|third 1/3 #
|quarter fourth 1/4 #|fifth 1/5 #|sixth 1/6 #|seventh 1/7 #|eighth 1/8 #
|ninth 1/9 #|twelfth 1/12 #|sixteenth 1/16 #|twentieth 1/20 #|tenth 1/10 #
|belowzero -1 #|hundredth 1/100 #|thousandth 1/1000 #
|different more distinct possible total unique whole extra of all each real integer
 positive ordered old tall altogether later 1 #
|st nd rd th 1 #"""
# Nouns that only say what is counted. Each is a unit of its own.
NOUNS = """unit point way solution root digit apple orange banana egg cookie cake candy book page
pen pencil marble ball card coin ticket toy box bag bottle stamp sticker shirt flower tree cat dog
bird fish cow chicken horse animal person people student child children kid boy girl man men woman
women friend player worker teacher member team class game match goal step lap car bus truck
train bike wheel word letter number pair pairing group set subset triple element term
triangle square circle rectangle side edge vertex vertices face angle line segment path route
arrangement permutation combination outcome possibility choice value case factor divisor multiple
prime zero time trip question problem test piece slice part serving meal sandwich pizza
house room floor seat table chair row column block tile cube brick stone rock bead shell rose
plant seed bean nut potato tomato carrot pie donut muffin cupcake brownie chocolate bar can jar
carton packet pack package crate basket bucket barrel load shelf shelves guest customer visitor
passenger soldier employee family families sibling brother sister daughter son cousin crayon
marker notebook paper sheet photo picture painting song movie video episode message email call
post vote share sale order item product gift present doll balloon ribbon button dress shoe sock
hat glove coat pants uniform race round turn move jump stair roll flip toss throw coloring
function sequence string code password region intersection handshake committee base baseball"""
SPELLINGS = {
    r"\bbelow zero$": "belowzero",
    r"\b(?:square|sq)\.? (?=[a-z])(\w+)": r"\1^2",  # square metres
    r"\b(?:cubic|cu)\.? (?=[a-z])(\w+)": r"\1^3",
    r"\bms *\^ *\{?-": "m s^-",  # ms^{-1} is m/s, no millisecond
    r"\^\\circ": " degree ",
    r"\bdegrees? +(?=[CF]\b|[Cc]els|[Ff]ahr)": "",
    r"\bmph\b": "mi/h",
    r"\\(?=[$%])|[{}.]|\bper\b(?= *$)": " ",
    r"\bper\b": "/",
}
# An optional slash, a name, an optional power: / s^2
FACTOR = re.compile(r"(/)? *([A-Za-z]+|''?|[%$€£₹元¥¢])(?: *\^ *(-?\d))? *")

UNIT = {}  # size and base unit by name, in the plural too
for line in UNITS.split("|") + [f"{noun} 1 {noun}" for noun in NOUNS.split()]:
    *names, size, base = line.split()
    for name in names:
        for ending in ("", "s", "es"):
            UNIT.setdefault(name + ending, (Fraction(size), base))


@functools.lru_cache
def read_unit(text: str) -> tuple[Fraction, Fraction, tuple] | None:
    """Read all words after a number: `million km/h` is (10^6, 5/18, (("m", 1), ("s", -1))).

    These are the factor for the number, the unit's size in base units, and the power of each base
    unit. None if a word is unknown.
    """
    text = rewrite(text, SPELLINGS).strip()
    multiple = size = Fraction(1)
    powers = Counter()
    while text:
        factor = FACTOR.match(text)
        unit = factor and (UNIT.get(factor[2]) or UNIT.get(factor[2].lower()))
        if not unit:
            return None

        power = int(factor[3] or 1)
        if factor[1]:
            power = -power
        if unit[1] == "#":
            # K may be kelvin: J/mol K and J mol^{-1} K^{-1} must agree.
            is_letter = len(factor[2]) == 1
            multiple *= unit[0] ** (1 if is_letter else power)  # per dozen: 1/12
        else:
            size *= unit[0] ** power
            powers[unit[1]] += power
        text = text[factor.end() :]
    return multiple, size, tuple(sorted(powers.items()))
