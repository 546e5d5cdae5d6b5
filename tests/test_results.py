"""Which arguments of a run its results line says were changed."""

import classify
from utils.results import NO_EFFECT
from utils.run import OneLineParser


def test_what_differs_from_a_default_is_recorded_whatever_its_name():
    parser = OneLineParser()
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--option-of-tomorrow", type=int, default=3)
    assert parser.parse_args([]).changed == [] == parser.parse_args(["--rate", "0.1"]).changed
    assert parser.parse_args(["--option-of-tomorrow", "4"]).changed == ["option_of_tomorrow"]
    args = classify.parse_arguments(["--epochs", "10", "--workers", "1", "--lr", "0.1"])
    assert {"epochs", "lr", "workers"} == {*args.changed} and {"workers"} == {*args.changed} & NO_EFFECT
