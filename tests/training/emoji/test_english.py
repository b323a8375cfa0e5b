import pytest

from fewstep.training.emoji.english import article, is_countable, plural, with_article


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("red apple", "red apples"),
        ("fox", "foxes"),
        ("butterfly", "butterflies"),
        ("monkey", "monkeys"),
        ("computer mouse", "computer mice"),
        ("maple leaf", "maple leaves"),
        ("potato", "potatoes"),
        ("tropical fish", "tropical fish"),
        ("glass of milk", "glasses of milk"),
        ("ear of corn", "ears of corn"),
        ("snowman without snow", "snowmen without snow"),
        ("woman", "women"),
        ("octopus", "octopuses"),
        ("magnifying glass tilted left", "magnifying glasses tilted left"),
        ("sheaf of rice", "sheaves of rice"),
    ],
)
def test_plural_is_of_the_main_noun(one, many):
    assert plural(one) == many


@pytest.mark.parametrize("word", ["apple", "hourglass", "umbrella", "x-ray", "egg", "OK hand"])
def test_an_before_a_vowel_sound(word):
    assert article(word) == "an"


@pytest.mark.parametrize("word", ["dog", "unicorn", "one-piece swimsuit", "euro", "ewe", "house"])
def test_a_before_a_consonant_sound(word):
    assert article(word) == "a"


@pytest.mark.parametrize(
    "name", ["french fries", "broccoli", "scissors", "fire", "money with wings"]
)
def test_plurals_and_masses_take_neither_article_nor_number(name):
    assert with_article(name) == name
    assert not is_countable(name)


def test_names_of_two_things_are_not_counted():
    assert not is_countable("bow and arrow")
    assert with_article("bow and arrow") == "a bow and arrow"
