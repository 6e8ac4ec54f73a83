"""The story world's tables: what can be said, and in which words.

A `World` is a small hidden-variable model of stories. Its variables (hero, animal, place, ...) are drawn once per
story, uniformly and independently; its sentence kinds come in one fixed order; each kind is written by a template
whose slots spell the variables. Some slots spell a variable through a word that it determines (the obstacle its
tool, the animal its food), so a reader has to know the map to finish the sentence.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """A place in a template: the variable it tells, and the words that tell each value (one-to-one)."""

    variable: str
    surface: dict[str, str]


@dataclass(frozen=True)
class Template:
    """A sentence with `{slot}` places; usable only once earlier sentences have told every variable in `needs`."""

    text: str
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Kind:
    """A step of the story, written by one of `templates`, uniformly among those whose needs are met.

    It is told with probability `chance` when earlier sentences have told every variable in `needs`, else never.
    """

    name: str
    templates: tuple[Template, ...]
    chance: float = 1.0
    needs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class World:
    """The tables a story is drawn from.

    `variables`: values of each independent, uniform hidden variable. `implied`: variable -> (the variable that
    determines it, value of that one -> value of this one). `slots`: by the name templates use. `kinds`: in order.
    """

    variables: dict[str, tuple[str, ...]]
    implied: dict[str, tuple[str, dict[str, str]]]
    slots: dict[str, Slot]
    kinds: tuple[Kind, ...]


BOYS = ["Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Finn", "Noah", "Otto", "Hugo"]
GIRLS = ["Anna", "Lily", "Mia", "Emma", "Rosa", "Ella", "Nora", "Lucy", "Ruby", "Clara"]
COLOURS = ["red", "blue", "green", "yellow", "orange", "golden"]
FAMILY = ["mother", "father", "sister", "brother", "grandma", "grandpa"]
# animal: (how it moves, what it eats)
ANIMALS = {
    "dog": ("ran", "bones"),
    "cat": ("crept", "milk"),
    "rabbit": ("hopped", "carrots"),
    "duck": ("waddled", "bread"),
    "bear": ("marched", "honey"),
    "mouse": ("hurried", "cheese"),
    "horse": ("trotted", "hay"),
    "monkey": ("swung", "bananas"),
    "squirrel": ("jumped", "nuts"),
    "owl": ("flew", "berries"),
    "fox": ("sneaked", "grapes"),
    "goat": ("skipped", "grass"),
    "frog": ("leaped", "flies"),
    "otter": ("slid", "fish"),
    "turtle": ("crawled", "leaves"),
}
# place: (what there is a lot of, who is there)
PLACES = {
    "farm": ("hens", "farmer"),
    "park": ("swings", "gardener"),
    "beach": ("crabs", "sailor"),
    "lake": ("swans", "fisher"),
    "market": ("stalls", "seller"),
    "school": ("desks", "teacher"),
    "castle": ("knights", "king"),
    "zoo": ("lions", "keeper"),
    "orchard": ("trees", "picker"),
    "bakery": ("cakes", "baker"),
    "library": ("shelves", "reader"),
    "harbor": ("ships", "captain"),
    "station": ("trains", "driver"),
    "museum": ("statues", "guide"),
    "camp": ("tents", "scout"),
}
# object: what one does with it
OBJECTS = {
    "kite": "fly",
    "hat": "wear",
    "ball": "bounce",
    "drum": "beat",
    "boat": "sail",
    "book": "read",
    "bell": "ring",
    "bike": "ride",
    "flute": "play",
    "doll": "hug",
    "puzzle": "solve",
    "map": "follow",
    "flag": "wave",
    "coin": "spend",
    "flower": "smell",
    "blanket": "share",
}
# obstacle: (the tool against it, the deed done to it)
OBSTACLES = {
    "wall": ("ladder", "climbed"),
    "stream": ("plank", "crossed"),
    "door": ("key", "opened"),
    "log": ("saw", "cut"),
    "rock": ("rope", "moved"),
    "web": ("broom", "swept"),
    "cave": ("candle", "lit"),
    "hole": ("shovel", "filled"),
    "bee": ("net", "caught"),
    "wolf": ("horn", "scared"),
    "puddle": ("mop", "dried"),
    "fire": ("bucket", "soaked"),
}
# mood at the start: the mood it turns into
MOODS = {
    "sad": "happy",
    "angry": "calm",
    "afraid": "brave",
    "lonely": "loved",
    "bored": "excited",
    "shy": "proud",
}
# weather: what one walks home in
WEATHERS = {
    "sunny": "sun",
    "rainy": "rain",
    "windy": "wind",
    "snowy": "snow",
    "foggy": "fog",
    "stormy": "storm",
}


def with_article(noun: str, first: bool = False) -> str:
    """`noun` with its indefinite article, capitalised when it is the `first` word of a sentence."""
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article.capitalize() if first else article} {noun}"


def _spell(values: dict[str, str] | list[str]) -> dict[str, str]:
    return dict(values) if isinstance(values, dict) else {value: value for value in values}


def _english() -> World:
    """The default world: see the tables above."""
    animals, places, objects = list(ANIMALS), list(PLACES), list(OBJECTS)
    obstacles, moods, weathers = list(OBSTACLES), list(MOODS), list(WEATHERS)
    slots = {
        "hero": Slot("hero", _spell(BOYS + GIRLS)),
        "he": Slot("gender", {"boy": "he", "girl": "she"}),
        "He": Slot("gender", {"boy": "He", "girl": "She"}),
        "him": Slot("gender", {"boy": "him", "girl": "her"}),
        "his": Slot("gender", {"boy": "his", "girl": "her"}),
        "His": Slot("gender", {"boy": "His", "girl": "Her"}),
        "child": Slot("gender", {"boy": "boy", "girl": "girl"}),
        "animal": Slot("animal", _spell(animals)),
        "an_animal": Slot("animal", {animal: with_article(animal) for animal in animals}),
        "An_animal": Slot("animal", {animal: with_article(animal, first=True) for animal in animals}),
        "moved": Slot("animal", {animal: moved for animal, (moved, _) in ANIMALS.items()}),
        "food": Slot("animal", {animal: food for animal, (_, food) in ANIMALS.items()}),
        "place": Slot("place", _spell(places)),
        "things": Slot("place", {place: things for place, (things, _) in PLACES.items()}),
        "keeper": Slot("place", {place: keeper for place, (_, keeper) in PLACES.items()}),
        "object": Slot("object", _spell(objects)),
        "use": Slot("object", _spell(OBJECTS)),
        "colour": Slot("colour", _spell(COLOURS)),
        "a_colour": Slot("colour", {colour: with_article(colour) for colour in COLOURS}),
        "family": Slot("family", _spell(FAMILY)),
        "obstacle": Slot("obstacle", _spell(obstacles)),
        "an_obstacle": Slot("obstacle", {obstacle: with_article(obstacle) for obstacle in obstacles}),
        "a_tool": Slot(
            "obstacle",
            {obstacle: with_article(tool) for obstacle, (tool, _) in OBSTACLES.items()},
        ),
        "deed": Slot("obstacle", {obstacle: deed for obstacle, (_, deed) in OBSTACLES.items()}),
        "mood": Slot("mood", _spell(moods)),
        "relief": Slot("mood", _spell(MOODS)),
        "weather": Slot("weather", _spell(weathers)),
        "sky": Slot("weather", _spell(WEATHERS)),
    }

    def kind(name: str, *texts: str, chance: float = 1.0, needs: str | None = None) -> Kind:
        templates = tuple(Template(text) for text in texts)
        return Kind(
            name,
            templates,
            chance,
            frozenset() if needs is None else frozenset({needs}),
        )

    success = (
        Template("At last the {animal} found the {colour} {object}."),
        Template("The {colour} {object} was waiting at the {place}."),
        Template("{hero} held the {object} and smiled at the {animal}."),
        Template("{hero} showed {his} {family} the {object}.", frozenset({"family"})),
        Template("The {animal} could see that {hero} was {relief} now.", frozenset({"mood"})),
    )
    ending = (
        Template("That night, {hero} dreamed of the {colour} {object}."),
        Template("{He} thanked {his} good friend, the {animal}."),
        Template("They sang all the way home from the {place}."),
        Template("The {animal} was glad to have a friend like {hero}."),
        Template("At home, {he} gave a lot of {food} to the {animal}."),
        Template(
            "{hero} gave the {colour} {object} to {his} {family}.",
            frozenset({"family"}),
        ),
        Template("In the end, {hero} felt very {relief}.", frozenset({"mood"})),
        Template("And {hero} was never {mood} again, only {relief}.", frozenset({"mood"})),
        Template("Out in the {sky}, {hero} thanked the clever {animal}.", frozenset({"weather"})),
    )
    kinds = (
        kind(
            "opening",
            "One {weather} day, {hero} went to the {place}.",
            "Once a little {child} named {hero} lived near the {place}.",
            "{hero} and {his} {family} spent every morning at the {place}.",
        ),
        kind(
            "friend",
            "{An_animal} {moved} over to {him} and said hello.",
            "{His} best friend was a clever {animal}.",
            "{hero} met {an_animal} behind the {things}.",
        ),
        kind(
            "mood",
            "{hero} looked {mood} from the start.",
            "The {animal} saw that {hero} was {mood}.",
            "{He} told the {animal} why {he} was {mood}.",
            chance=0.6,
        ),
        kind(
            "wish",
            "{hero} wanted to {use} {a_colour} {object}.",
            "{He} needed {a_colour} {object} for {his} {family}.",
            "The {keeper} showed {him} {a_colour} {object}.",
        ),
        kind(
            "obstacle",
            "But there was {an_obstacle} between {hero} and the {object}.",
            "On the way to the {place}, {an_obstacle} stopped the {animal}.",
            "Soon {hero} came to {an_obstacle} beside the {things}.",
            chance=0.7,
        ),
        kind(
            "remedy",
            "{hero} took {a_tool} and {deed} the {obstacle}.",
            "The {animal} brought {a_tool}, so {hero} {deed} the {obstacle}.",
            "So {he} {deed} the {obstacle} with {a_tool}.",
            needs="obstacle",
        ),
        Kind("success", success, chance=0.4),
        Kind("ending", ending),
    )
    gender = dict.fromkeys(BOYS, "boy") | dict.fromkeys(GIRLS, "girl")
    variables = {
        "hero": tuple(BOYS + GIRLS),
        "animal": tuple(animals),
        "place": tuple(places),
        "object": tuple(objects),
        "colour": tuple(COLOURS),
        "family": tuple(FAMILY),
        "obstacle": tuple(obstacles),
        "mood": tuple(moods),
        "weather": tuple(weathers),
    }
    return World(variables, {"gender": ("hero", gender)}, slots, kinds)


ENGLISH = _english()
