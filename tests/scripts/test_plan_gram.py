import processes


def test_a_cluster_is_planned(tmp_path):
    cases = {"plan": ["--examples=100000"], "few": ["--examples=100"], "none": ["--nodes=0"]}
    ended = processes.outcomes("plan_gram.py", cases, tmp_path)
    assert [ended[name].returncode for name in cases] == [0, 2, 2], ended
    assert "modelled" in ended["plan"].stdout.splitlines()[0]
    assert all(len(ended[name].stderr.splitlines()) == 1 for name in ("few", "none"))
