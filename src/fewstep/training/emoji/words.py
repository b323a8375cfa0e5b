"""Word lists behind the captions: how nouns behave, what has sides, what is left out."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# names without article or number, by their last word
UNCOUNTED = _words("""
    bacon badminton baseball basketball blood bowling bread breast-feeding broccoli butter
    camping cash clothes coffee construction cooking coral corn custard dango dizzy dna fire
    flatbread fog foggy fondue food football fuji garlic green hair hockey ice lacrosse
    lightning locked luggage mate milk money oden paper polish polo pong popcorn rain rice rugby
    sake salad salt snow soap soccer softball spaghetti sushi tea tennis thread volleyball
    voltage water way wine wood yang yarn
""")
# ... but these are things one can count
COUNTED_NAMES = frozenset({"baseball", "softball", "basketball", "volleyball"})
# nouns that are plural as they stand
PLURALS = _words("""
    arrows arts bags bars beads beans blueberries books briefs bubbles busts cards chains
    cherries children chopsticks clothes customs dancers dividers dolls droplets eyebrows eyes
    feet fingers fireworks footprints frames fries gifts glasses gloves goggles grapes hands
    hearts houses jeans knobs letters lips lungs maracas men mountains mugs notes numbers palms
    pancakes peanuts people points prints rays scissors shoes shorts skis socks sparkles
    speakers springs streamers sunglasses swords symbols tabs teeth tickets waves wings women
""")
IRREGULAR = {
    **{word: word for word in _words("bison blowfish buffalo deer fish jellyfish moose sheep yen")},
    **{word: word for word in _words("aircraft biceps shrimp squid")},
    **{f"{stem}o": f"{stem}oes" for stem in _words("mang mosquit potat tomat tornad volcan")},
    "calf": "calves",
    "child": "children",
    "die": "dice",
    "elf": "elves",
    "foot": "feet",
    "goose": "geese",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "mouse": "mice",
    "ox": "oxen",
    "person": "people",
    "scarf": "scarves",
    "sheaf": "sheaves",
    "tooth": "teeth",
    "wolf": "wolves",
}
# words after which the rest of a name only describes: glass | of milk, face | savoring food
DESCRIBING = _words("""
    at behind blowing bouncing by crossing decreasing done exhaling facing feeding fluttering
    for from gesturing getting golfing holding hugging in increasing juggling lifting not of on
    over playing pointing raising rowing running savoring screaming showing surfing swimming
    taking tilted tipping vomiting walking wearing with without wrestling
""")

COLOURS = _words("""
    black blond blue brown color colorful colour gold golden gray green grey orange pink purple
    rainbow red silver violet white yellow
""")
# letters, clock hands, and whatever else would be wrong in a mirror
SIDED = _words("""
    8 abc ambulance atm bank banknote battery bullseye calendar cards chart clapper clock
    clockwise club compass counterclockwise credit crescent dna dollar dvd euro fire-engine
    gibbous globe hospital hotel identification input keyboard label left leftwards letter
    license love map medal memo money musical newspaper o'clock pencil police pool post pound
    quarter receipt right rightwards school sign slot station stop stopwatch store thirty ticket
    tickets waning watch waxing yen
""")
# keywords that say what the captions say of colour, place, size, number or style
CONTROL = COLOURS | _words("""
    above background below big bottom center centre corner down drawing eight emoji flat four
    front gradient icon image large left little lower medium next noto one outline picture
    render right seven six small style symbol three tiny top two under up upper
""")
# keywords that are somebody's brand or character, or that a default model should not answer to
LEFT_OUT = frozenset({"burger king", "harry potter"}) | _words("""
    amex ass batman boob boobs breast butt cock diners eeyore elsa google ikea imac ipad iphone
    ipod legolas litaf lust mario mastercard mcdonald's mcdonalds nba nemo nfl oreo phallic
    pikachu playboy pokemon sasha sexual sexy shit shitface snapstreak staffmode superbowl sven
    terrorism titanic twitter uber vespa visa
""")
