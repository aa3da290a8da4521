"""The manual says what the program does: every option and command, by name and by usage."""

import re
import shutil
import subprocess

import pytest

from harness.env import SOURCE
from harness.node import run_p2pfs

MAN = SOURCE / "man"
PAGES = sorted(MAN.glob("*.[1-8]"))


def options():
    """(name, argument or None, refused) of each entry of options_table."""
    source = (SOURCE / "fs/options.c").read_text()
    table = source[source.index("options_table[] = {") :]
    # entries: from one .name to the next
    found = []
    for entry in re.split(r"(?=\.name = )", table)[1:]:
        name = re.match(r'\.name = "(\w+)"', entry)
        if name:
            argument = re.search(r'\.argument = "([^"]+)"', entry)
            found.append((name[1], argument and argument[1], ".refused" in entry))
    return found


def commands():
    source = (SOURCE / "fs/cmd.c").read_text()
    return re.findall(r"&cmd_(\w+)", source[source.index("cmd_table[] = {") :])


def rendered(page):
    done = subprocess.run(
        ["groff", "-mdoc", "-Tascii", "-P-cbou", "-rHY=0", "-rLL=400n", str(page)],
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(done.stdout.split()).replace(" ...", "...")


def test_the_tables_are_found():
    assert len(options()) > 20
    assert {"ls", "pull", "help"} <= set(commands())


def test_every_option_is_in_the_manual_and_no_other():
    page = (MAN / "p2pfs.1").read_text()
    section = page[page.index(".Sh MOUNT OPTIONS") : page.index(".Sh CONTROL FILES")]
    own, refused = section[: section.index(".Pp\nOf libfuse")].split("known but refused")
    for name, argument, is_refused in options():
        if is_refused:
            assert re.search(rf"\b{name}\b", refused), f"{name} is not among the refused"
            assert f".It Cm {name}" not in own, f"{name} is refused but described"
        else:
            heading = f".It Cm {name}= Ns Ar {argument}" if argument else f".It Cm {name}"
            assert heading in own.splitlines(), f"no line '{heading}'"
    named = set(re.findall(r"^\.It Cm (\w+)", own, re.MULTILINE))
    assert named == {name for name, _, is_refused in options() if not is_refused}


def test_every_option_is_in_help():
    text = run_p2pfs("help").stdout
    shown = text[text.index("mount options") :]
    for name, argument, is_refused in options():
        line = f"{name}={argument}" if argument else name
        listed = re.search(rf"^\s+{re.escape(line)}\s", shown, re.MULTILINE)
        assert bool(listed) != is_refused, name


def test_every_command_is_in_help_and_in_the_manual():
    overview = run_p2pfs("help").stdout
    page = rendered(MAN / "p2pfs.1")
    for name in commands():
        text = run_p2pfs("help", name).stdout
        usage, summary = re.match(r"usage: p2pfs (.*)\n(.*)\n", text).groups()
        assert usage.split()[0] == name
        assert re.search(rf"^\s+{name}\s+{re.escape(summary)}$", overview, re.MULTILINE), name
        assert usage in page, f"p2pfs(1) does not have '{usage}'"
    source = (MAN / "p2pfs.1").read_text()
    assert re.findall(r'^\.\\" cmd (\w+)', source, re.MULTILINE) == commands()


def test_help_is_what_dash_h_prints():
    for name in commands():
        text = run_p2pfs("help", name).stdout
        assert run_p2pfs(name, "--help").stdout == text
        assert run_p2pfs(name, "-h").stdout == text


def test_every_command_option_is_explained():
    for name in commands():
        text = run_p2pfs("help", name).stdout
        usage, rest = text.split("\n", 1)
        for option in re.findall(r"--[a-z]+", usage):
            assert option in rest, f"p2pfs help {name} does not explain {option}"


def test_examples_use_real_commands():
    names = set(commands())
    readme = (SOURCE / "README.md").read_text()
    examples = re.findall(r"```.*?```", readme, re.DOTALL)
    for page in PAGES:
        examples += re.findall(r"^\.Bd -literal.*?^\.Ed", page.read_text(), re.DOTALL | re.MULTILINE)
    used = re.findall(r"^\s*p2pfs ([a-z]+) ", "\n".join(examples), re.MULTILINE)
    used += re.findall(r"`p2pfs ([a-z]+)[ `]", readme)
    assert len(used) > 5 and set(used) <= names, set(used) - names


def test_extended_attributes_are_in_the_manual():
    page = (MAN / "p2pfs-semantics.7").read_text()
    source = (SOURCE / "fs/xattr.c").read_text()
    for name in re.findall(r'"(?:user\.p2pfs\.)?(\w+)", *(?:\.\w+ = )?\w*_?get', source):
        assert f"user.p2pfs.{name}" in page, name
    for name in "version digest shard_size shards resident replicas sources state transport pinned".split():
        assert f"user.p2pfs.{name}" in page and f'"{name}"' in source, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_render_without_a_warning(page):
    done = subprocess.run(
        ["groff", "-mdoc", "-ww", "-Tutf8", str(page)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout) > 500
    if shutil.which("mandoc"):
        done = subprocess.run(
            ["mandoc", "-Tlint", "-W", "warning", str(page)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == "", done.stdout


def test_links_lead_somewhere():
    readme = (SOURCE / "README.md").read_text()
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        assert (SOURCE / target).exists(), target
    for script in re.findall(r"scripts/[\w-]+", readme):
        assert (SOURCE / script).exists(), script
