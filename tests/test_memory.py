import pytest

from lexibit import LexibitError, memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("100B", 100),
        ("2kb", 2000),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("3 GiB", 3 << 30),
        ("2T", 2 * 10**12),
        ("1KiB", 1024),
    ],
)
def test_sizes(text, size):
    assert memory.parse(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "GB", "5iB", "-1GB", "1.5.2GB", "1XB", "0", "0.1B", "many", "1e9"])
def test_what_is_no_size_is_refused_and_the_option_named(text):
    with pytest.raises(LexibitError, match="--memory"):
        memory.parse(text, "--memory")


def test_what_is_available_is_some_of_what_the_machine_has():
    import os

    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available() <= most
