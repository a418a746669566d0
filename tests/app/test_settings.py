"""
What options and the configuration file become.
"""

import os

import pytest
from twisted.python import usage

from nixserve.app import service as servicemodule
from nixserve.app.service import Options, ServeService
from nixserve.app.settings import ServiceSettings, readConfig
from nixserve.builder.settings import BuildSettings, SandboxMode
from nixserve.errors import UsageError
from nixserve.protocol.limits import Limits


def parse(tmp_path, *words, config=None):
    """The settings that a command line gives, with a configuration file."""
    arguments = ["--state", str(tmp_path), *words]
    if config is not None:
        (tmp_path / "config.toml").write_text(config)
        arguments += ["--config", str(tmp_path / "config.toml")]
    options = Options()
    options.parseOptions(arguments)
    return options.settings


class TestStores:
    """Which store a URI means."""

    def test_remote(self, tmp_path):
        """The service takes a URI as it is written."""
        assert (
            parse(tmp_path, "--store", "ssh://me@host:22?remote-store=/x").store == "ssh://me@host:22?remote-store=/x"
        )

    def test_mistakes(self, tmp_path):
        """What is wrong with a URL is said before anything starts."""
        with pytest.raises(usage.UsageError, match="write it with ssh:// in front"):
            parse(tmp_path, "--store", "ssh-ng://host")


class TestBuilding:
    """The options about building."""

    def test_defaults(self, tmp_path):
        """As many builds as processors, everything else as Nix has it."""
        settings = parse(tmp_path)
        assert settings.maxJobs == len(os.sched_getaffinity(0))
        assert settings.builds == BuildSettings()
        assert settings.builds.sandbox is SandboxMode.AUTO and settings.builds.cores == 0

    def test_commandLine(self, tmp_path):
        """Each option arrives."""
        settings = parse(
            tmp_path, "--max-jobs", "7", "--cores", "3", "--sandbox", "on", "--system-features", "kvm,big-parallel"
        )
        assert (settings.maxJobs, settings.builds.cores, settings.builds.sandbox) == (7, 3, SandboxMode.ON)
        assert settings.builds.systemFeatures == {"kvm", "big-parallel"}

    @pytest.mark.parametrize("wordy", [True, False])
    def test_limits(self, tmp_path, wordy):
        """What the operator allows builds, on the command line and in a file; without a word of it, nothing."""
        limits = {"timeout": 1, "max-silent-time": 2, "max-build-log-size": 3, "max-output-size": 4, "extra-jobs": 0}
        words = [word for key, value in limits.items() for word in (f"--{key}", str(value))]
        config = "".join(f"{key} = {value}\n" for key, value in limits.items())
        settings = parse(tmp_path, *words) if wordy else parse(tmp_path, config=config)
        builds = settings.builds
        assert (builds.timeout, builds.maxSilentTime, builds.maxBuildLogSize, builds.maxOutputSize) == (1, 2, 3, 4)
        assert settings.extraJobs == 0
        assert parse(tmp_path, config="").extraJobs == 1

    def test_buildNetwork(self, tmp_path, monkeypatch):
        """Downloads get the network of the host, or their own, for which a program must be there."""
        assert parse(tmp_path, "--build-network", "host").builds == BuildSettings()
        monkeypatch.setattr("shutil.which", {"slirp4netns": "/usr/bin/slirp4netns"}.get)
        assert parse(tmp_path, config="build-network = 'own'").builds.networkHelper == "/usr/bin/slirp4netns"
        monkeypatch.setattr("shutil.which", {}.get)
        with pytest.raises(usage.UsageError, match="for which slirp4netns must be installed"):
            parse(tmp_path, "--build-network", "own")

    @pytest.mark.parametrize(
        ("config", "features"),
        [
            ("max-jobs = 7\ncores = 3\nsandbox = 'off'\nsystem-features = ['kvm', 'x y']", {"kvm", "x y"}),
            ("max-jobs = '7'\ncores = '3'\nsandbox = 'off'\nsystem-features = 'kvm x'", {"kvm", "x"}),
            ("max-jobs = 7\ncores = 3\nsandbox = 'off'\nsystem-features = []", set()),
        ],
    )
    def test_config(self, tmp_path, config, features):
        """A file may have numbers and lists, or the words of the command line."""
        settings = parse(tmp_path, config=config)
        assert (settings.maxJobs, settings.builds.cores, settings.builds.sandbox) == (7, 3, SandboxMode.OFF)
        assert settings.builds.systemFeatures == features

    def test_limitsOfKeys(self, tmp_path):
        """What one key may use is told in MiB and requests, on the command line or in the file."""
        assert parse(tmp_path).limits == Limits()
        config = "max-key-memory = 300\nmax-untrusted-memory = '40'\nmax-key-requests = 3"
        expected = Limits(keyMemory=300 << 20, untrustedMemory=40 << 20, keyRequests=3)
        assert parse(tmp_path, config=config).limits == expected
        words = ["--max-key-memory", "300", "--max-untrusted-memory", "40", "--max-key-requests", "3"]
        assert parse(tmp_path, *words).limits == expected
        for name in ("max-key-memory", "max-untrusted-memory", "max-key-requests"):
            with pytest.raises(usage.UsageError, match=f"the value of '{name}' is '0'; it must be a number, 1 or more"):
                parse(tmp_path, f"--{name}", "0")

    @pytest.mark.parametrize("config", [None, "max-jobs = 3"])
    def test_noBuilds(self, tmp_path, config):
        """0 jobs is a value; the command line wins over the file."""
        assert parse(tmp_path, "--max-jobs", "0", config=config).maxJobs == 0
        assert parse(tmp_path, config="max-jobs = 0").maxJobs == 0

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--max-jobs", "many"], "the value of 'max-jobs' is 'many'; it must be a number, 0 or more"),
            (["--max-jobs", "-1"], "the value of 'max-jobs' is '-1'"),
            (["--cores", "1.5"], "the value of 'cores' is '1.5'"),
            (["--build-network", "no"], "the value of 'build-network' is 'no'; it must be host or own"),
            (["--sandbox", "maybe"], "the value of 'sandbox' is 'maybe'; it must be auto, on or off"),
        ],
    )
    def test_mistakes(self, tmp_path, words, complaint):
        """What cannot be is refused before anything starts."""
        with pytest.raises(usage.UsageError) as caught:
            parse(tmp_path, *words)
        assert complaint in str(caught.value)

    @pytest.mark.parametrize(
        ("config", "complaint"),
        [
            ("max-jobs = true", "the value of 'max-jobs' must be a number"),
            ("cores = 1.5", "the value of 'cores' must be a number"),
            ("sandbox = true", "the value of 'sandbox' must be a string"),
            ("system-features = [1]", "the value of 'system-features' must be a string"),
        ],
    )
    def test_configTypes(self, tmp_path, config, complaint):
        """The wrong type is named."""
        (tmp_path / "config.toml").write_text(config)
        with pytest.raises(UsageError) as caught:
            readConfig(str(tmp_path / "config.toml"))
        assert complaint in str(caught.value)


class TestStartBuilds:
    """What the service makes of the options about building."""

    def start(self, tmp_path, **given):
        """Builds, stopped again."""
        settings = ServiceSettings.complete({"state": str(tmp_path), **given}, {})
        builds = ServeService(settings, None, {})._startBuilds(None, None)
        if builds is not None:
            builds.stop()
        return builds

    def test_noBuilds(self, tmp_path):
        """Without jobs there is nobody who builds."""
        assert self.start(tmp_path, **{"max-jobs": 0}) is None

    def test_maxJobs(self, tmp_path, monkeypatch):
        """The number arrives."""
        monkeypatch.setattr(servicemodule, "sandboxProblem", lambda: "")
        assert self.start(tmp_path, **{"max-jobs": 5}).maxJobs == 5

    def test_sandboxOn(self, tmp_path, monkeypatch):
        """Builds that are to be confined and cannot be keep the service from starting, with the reason."""
        monkeypatch.setattr(servicemodule, "sandboxProblem", lambda: "no namespaces")
        with pytest.raises(UsageError) as caught:
            self.start(tmp_path, sandbox="on")
        assert str(caught.value) == "builds cannot be confined, as --sandbox on demands: no namespaces"

    def test_noNetwork(self, tmp_path, monkeypatch):
        """Nor does it start if builds are to have a network of their own, and cannot."""
        monkeypatch.setattr(servicemodule, "sandboxProblem", lambda helper="": helper and "no /dev/net/tun")
        monkeypatch.setattr("shutil.which", {"slirp4netns": "/usr/bin/slirp4netns"}.get)
        with pytest.raises(UsageError) as caught:
            self.start(tmp_path, **{"build-network": "own"})
        assert str(caught.value) == (
            "builds cannot have a network of their own, as --build-network own demands: no /dev/net/tun"
        )

    @pytest.mark.parametrize("mode", ["auto", "off"])
    def test_sandboxNotOn(self, tmp_path, monkeypatch, mode):
        """Else it starts."""
        monkeypatch.setattr(servicemodule, "sandboxProblem", lambda: "no namespaces")
        assert self.start(tmp_path, sandbox=mode) is not None
