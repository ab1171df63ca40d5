import itertools

from tests.plugins.pairs import pairwise


def test_every_two_values_meet():
    parameters = {"a": [1, 2, 3], "b": "xy", "c": [True, False], "d": [0, 1, 2, 3]}
    cases = pairwise(parameters)
    for one, other in itertools.combinations(parameters, 2):
        met = {(case[one], case[other]) for case in cases}
        assert met == set(itertools.product(parameters[one], parameters[other]))
    assert len(cases) < 3 * 2 * 2 * 4 / 2
