from conf import bootstrap


def test_nothing_is_missing_where_the_project_is_installed():
    assert bootstrap.find_missing() == []


def test_an_absent_package_is_named_with_its_pin(monkeypatch, tmp_path):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# comment\nPyYAML==0.1   # there, in another version\nno-such[extra]==1.2   # absent\n")
    monkeypatch.setattr(bootstrap, "REQUIREMENTS", requirements)
    assert bootstrap.find_missing() == ["no-such[extra]==1.2"]
