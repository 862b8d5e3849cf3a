from concurrent.futures import ThreadPoolExecutor

from service.ids import prediction_ids, request_id


def test_request_id_in_many_threads_is_unique() -> None:
    """Request ids from several threads are unique, and have 16 hexadecimal digits."""
    with ThreadPoolExecutor(4) as pool:
        ids = [name for some in pool.map(lambda _: [request_id() for _ in range(1000)], range(8)) for name in some]
    assert 8000 == len(set(ids))
    assert {16} == {len(name) for name in ids}
    assert all(int(name, 16) >= 0 for name in ids)


def test_prediction_ids_are_unique_and_sort_by_time() -> None:
    """Prediction ids are unique, have 32 hexadecimal digits, and sort by their time."""
    early, late = prediction_ids(1000, 1.7e9), prediction_ids(1000, 1.7e9 + 0.001)
    assert 2000 == len({*early, *late})
    assert {32} == {len(name) for name in early + late}
    assert all(int(name, 16) >= 0 for name in early + late)
    assert max(early) < min(late)
    assert [] == prediction_ids(0, 1.7e9)
