from service.sizes import RECENT, Sizes


def test_nothing_known_is_one_row() -> None:
    """Before any request of its length was seen, a request counts as a single row."""
    sizes = Sizes()
    sizes.saw(1000, 64)
    assert 1 == sizes.rows(0)
    assert 1 == sizes.rows(17_000_000)


def test_requests_of_a_length_are_like_each_other() -> None:
    """What had many rows is guessed to have as many again, whatever requests of other lengths had."""
    sizes = Sizes()
    sizes.saw(17_000_000, 1000)
    for _ in range(100):
        sizes.saw(300, 1)
        assert 1000 == sizes.rows(17_000_000)
        assert 1 == sizes.rows(300)


def test_among_different_ones_the_fewest_rows_are_guessed() -> None:
    """Where a length had few rows and many, few are guessed until those with few have not come for a while."""
    sizes = Sizes()
    sizes.saw(16_000, 1)
    for _ in range(RECENT - 1):
        sizes.saw(16_000, 64)
        assert 1 == sizes.rows(16_000)
    sizes.saw(16_000, 64)
    assert 64 == sizes.rows(16_000)
