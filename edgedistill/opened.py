"""Networks of an artifact, open while they are needed."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet

from edgedistill import free_memory
from edgedistill.bundle import NetworkFile
from edgedistill.network import CheckedNetwork, Session


class Networks(Mapping[str, CheckedNetwork]):
    """Networks of an artifact, opened when they are first looked up; those of one file share it.

    Args:
        files: By name.
        opener: Opens one.
        lasting: Names of those that stay open between requests.
        alone: Names of those that are never open beside others.
    """

    def __init__(
        self,
        files: Mapping[str, NetworkFile],
        opener: Callable[[NetworkFile], Session],
        lasting: Iterable[str],
        alone: Iterable[str] = (),
    ) -> None:
        self._files = files
        self._opener = opener
        self._lasting = frozenset(lasting)
        self._alone = frozenset(alone)
        self._used: set[str] = set()
        self._opened: dict[str, CheckedNetwork] = {}

    def __getitem__(self, name: str) -> CheckedNetwork:
        """Return a network; before one is opened, those that the request has not used are closed."""
        file = self._files[name]
        self._used.add(name)
        if name not in self._opened:
            self.close_unused()
            self._close(set(self._opened) if name in self._alone else self._alone)
            same = (net.session for k, net in self._opened.items() if self._files[k] == file)
            session = next(same, None) or self._opener(file)
            free_memory.give_back()  # what it took to open it
            self._opened[name] = CheckedNetwork(name, file.signature, session)
        return self._opened[name]

    def __contains__(self, name: object) -> bool:
        """Whether the artifact has it; nothing is opened."""
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return how many the artifact has."""
        return len(self._files)

    @property
    def opened(self) -> tuple[str, ...]:
        """Names of those that are open."""
        return tuple(self._opened)

    def begin(self) -> None:
        """Begin a request, of which nothing has been used yet."""
        self._used = set(self._lasting)

    def close_unused(self) -> None:
        """Close what the request has not used."""
        self._close(set(self._opened) - self._used - self._lasting)

    def _close(self, names: AbstractSet[str]) -> None:
        if names & self._opened.keys():
            self._opened = {k: network for k, network in self._opened.items() if k not in names}
            free_memory.give_back()
