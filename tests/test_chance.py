from concurrent.futures import ThreadPoolExecutor

from service.chance import MANY, Names


def test_no_name_is_given_twice_whoever_asks() -> None:
    """Names asked for one by one in several threads, and many at once, are all different and of their length."""
    names = Names(8)
    with ThreadPoolExecutor(4) as pool:
        found = [name for some in pool.map(lambda _: [names.one() for _ in range(5 * MANY)], range(8)) for name in some]
    found += names.some(1000)
    assert 40 * MANY + 1000 == len(set(found))
    assert {16} == {len(name) for name in found}
    assert all(int(name, 16) >= 0 for name in found)
