"""Which blocks hold the KV of which tokens, so that a prompt's known beginning is not computed.

Owns the index from token ids to blocks and the order in which idle blocks are given up. Who holds
a block is the `BlockPool`'s to know; what is in its memory, nobody's here. Not thread-safe: whoever
calls the pool calls the cache.

Blocks form a tree for each salt: a block's key is a hash over its parent's key and its own token
ids, so it stands for everything from the first token on. A block is found only through its
parents, so an idle parent is not given up before its children, unless a child is held by a
sequence and nothing else is left: that child then leaves the cache as well, and stays its
holder's.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.blocks import BlockPool
from engine.errors import BlockPoolCorruptError, OutOfBlocks

OnKeys = Callable[[Sequence[bytes]], None]


class Keys(Protocol):
    """How blocks are named: the same tokens after the same beginning have the same key."""

    def root(self, salt: bytes) -> bytes:
        """Return what stands for the empty beginning of every prompt under a salt."""
        ...

    def piece(self, tokens: Sequence[int]) -> bytes:
        """Return a block's token ids, packed; raises ValueError where one is out of range."""
        ...

    def block(self, above: bytes, piece: bytes) -> bytes:
        """Return the key of a block from its parent's, or the root's, and its packed token ids."""
        ...


@dataclass(frozen=True, kw_only=True)
class Acquired:
    """The blocks of one sequence: the first ones from the cache, the others to be filled.

    Attributes:
        blocks: Its block table; `shared` of them may also be other sequences', and must not be
            written to.
        tokens: Tokens whose KV is there.
    """

    blocks: list[int]
    shared: int
    tokens: int


@dataclass(eq=False, kw_only=True, slots=True)
class _Node:
    """One remembered block. `tokens` are its ids as packed for the hash."""

    key: bytes
    salt: bytes
    tokens: bytes
    block: int
    parent: "_Node | None"
    depth: int
    children: "dict[bytes, _Node]" = field(default_factory=dict)


class PrefixCache:
    """Finds, shares and gives up blocks of a pool by the tokens whose KV they hold.

    A salt separates tenants: blocks are never found under another one.

    Args:
        pool: Gets this cache attached.
        block_size: Tokens a block holds.
        keys: Names the blocks; `on_insert` and `on_evict` are told these names.
        on_insert: Called with the keys of blocks that the cache has taken in, parents first. Must
            not call the pool or the cache.
        on_evict: Called with the keys of blocks that it has given up, children first; likewise.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        keys: Keys,
        on_insert: OnKeys | None = None,
        on_evict: OnKeys | None = None,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; a block holds at least one token")
        self._pool = pool
        self._block_size = block_size
        self._keys = keys
        self._on_insert = on_insert
        self._on_evict = on_evict
        self._by_key: dict[bytes, _Node] = {}
        self._by_block: dict[int, _Node] = {}
        # Blocks that nobody holds, the one used longest ago first. A block comes after all of its
        # idle descendants, so that one pass in this order meets children before their parents.
        self._idle: OrderedDict[int, None] = OrderedDict()
        pool.attach(self)

    def __len__(self) -> int:
        """Blocks in the cache, held or idle."""
        return len(self._by_key)

    def match(self, tokens: Sequence[int], salt: bytes) -> list[int]:
        """Find the blocks of the longest known beginning of a prompt, in order.

        At least one token is left to compute: its logits are what the prompt is run for. Nobody
        holds the result: it is good until the pool or the cache is called for something else.
        """
        pieces = self._pieces(tokens, (len(tokens) - 1) // self._block_size)
        return [node.block for node in self._walk(pieces, salt)]

    def acquire(self, tokens: Sequence[int], salt: bytes, num_blocks: int) -> Acquired:
        """Take a sequence's blocks: known ones for its beginning, reserved ones for the rest.

        All of them are released together, by `BlockPool.release`.
        Raises OutOfBlocks where too few are available; nothing is changed then. Raises ValueError
        where `num_blocks` do not hold the tokens.
        """
        if not 0 < len(tokens) <= num_blocks * self._block_size:
            raise ValueError(
                f"{len(tokens)} tokens in {num_blocks} blocks of {self._block_size}: "
                "give at least one token, and blocks for all of them"
            )
        shared = self.match(tokens, salt)
        # Idle blocks that are about to be shared cannot be given up for the rest.
        available = self._pool.counts().available - sum(i in self._idle for i in shared)
        needed = num_blocks - len(shared)
        if needed > available:
            raise OutOfBlocks(needed=needed, free=available)
        self._pool.share(shared)
        return Acquired(
            blocks=shared + self._pool.reserve(needed),
            shared=len(shared),
            tokens=len(shared) * self._block_size,
        )

    def insert(self, tokens: Sequence[int], salt: bytes, block_ids: Sequence[int]) -> list[int]:
        """Take in a sequence's full blocks, whose KV is complete and is never written again.

        May be called again as more tokens are computed. Tokens without a block, blocks without
        tokens and a last block that is not full are ignored. Where another block already has the
        same tokens, that one stays and this one is the sequence's alone.

        Returns:
            The blocks that were taken in.

        Raises:
            BlockStateError: One is not owned by a sequence, or is in the cache for other tokens;
                nothing is changed then.
        """
        full = min(len(tokens) // self._block_size, len(block_ids))
        pieces = list(self._pieces(tokens, full))
        known = self._walk(iter(pieces), salt, block_ids)
        new: dict[bytes, _Node] = {}
        parent = known[-1] if known else None
        for i in range(len(known), full):
            key = self._key(parent, salt, pieces[i])
            if key in self._by_key or key in new:
                break  # Other tokens with the same key: it stays with the first.
            parent = new[key] = _Node(
                key=key,
                salt=salt,
                tokens=pieces[i],
                block=block_ids[i],
                parent=parent,
                depth=i,
            )
        self._add(list(new.values()))
        return [node.block for node in new.values()]

    # ---- for the pool

    def idle(self, ids: Sequence[int]) -> None:
        """Note that nobody holds these blocks any more: they can be given up, last of all."""
        self._idle.update(dict.fromkeys(ids))
        used: dict[int, _Node] = {}
        for i in ids:
            node: _Node | None = self._by_block[i]
            while node is not None and node.block not in used:
                used[node.block] = node
                node = node.parent
        # Idle parents move with them: they may have become idle before their children.
        for node in sorted(used.values(), key=lambda node: -node.depth):
            if node.block in self._idle:
                self._idle.move_to_end(node.block)

    def taken(self, ids: Sequence[int]) -> None:
        """Note that somebody holds these idle blocks again."""
        for i in ids:
            del self._idle[i]

    def evict(self, n: int) -> None:
        """Give up the `n` idle blocks used longest ago, children before their parents."""
        assert n <= len(self._idle), (n, len(self._idle))
        gone: list[_Node] = []
        while n:
            nodes = self._idle_leaves(n)
            n -= len(nodes)
            if not nodes:
                # Every idle block has held ones below it, and no other idle one has the first.
                nodes = _subtree(self._by_block[next(iter(self._idle))])
                n -= 1
                for node in nodes:
                    self._unlink(node)
            for node in nodes:
                self._idle.pop(node.block, None)
            gone += nodes
        self._pool.forget([node.block for node in gone])
        if self._on_evict is not None:
            self._on_evict([node.key for node in gone])

    # ----

    def check_integrity(self) -> None:
        """Recount everything; raises BlockPoolCorruptError where the books disagree."""
        self._pool.check_integrity()
        if self._by_block.keys() != self._pool.remembered():
            raise BlockPoolCorruptError("the cache and the pool remember different blocks")
        if self._idle.keys() != self._pool.idle():
            raise BlockPoolCorruptError("the cache and the pool take different blocks for idle")
        if len(self._by_key) != len(self._by_block):
            raise BlockPoolCorruptError("two keys name one block")
        for key, node in self._by_key.items():
            self._check_node(key, node)
        self._check_order()

    def _check_node(self, key: bytes, node: _Node) -> None:
        parent = node.parent
        if (
            not key == node.key == self._key(parent, node.salt, node.tokens)
            or self._by_block.get(node.block) is not node
            or (parent is not None and parent.children.get(key) is not node)
            or node.depth != (0 if parent is None else parent.depth + 1)
            or (parent is not None and self._by_key.get(parent.key) is not parent)
            or (parent is not None and parent.salt != node.salt)
            or any(self._by_key.get(k) is not child for k, child in node.children.items())
        ):
            raise BlockPoolCorruptError(f"block {node.block} is in the wrong place of the cache")

    def _check_order(self) -> None:
        passed: set[int] = set()
        for i in self._idle:
            parent = self._by_block[i].parent
            while parent is not None:
                if parent.block in passed:
                    raise BlockPoolCorruptError(f"block {parent.block} goes before its child {i}")
                parent = parent.parent
            passed.add(i)

    def _pieces(self, tokens: Sequence[int], blocks: int) -> Iterator[bytes]:
        """Yield the token ids of each of the first `blocks` blocks, packed."""
        for start in range(0, blocks * self._block_size, self._block_size):
            yield self._keys.piece(tokens[start : start + self._block_size])

    def _walk(
        self, pieces: Iterator[bytes], salt: bytes, block_ids: Sequence[int] = ()
    ) -> list[_Node]:
        """Return the nodes of the longest known beginning; hashes no more than it must.

        `block_ids` are blocks that probably hold the pieces: no hash is needed for those that do.
        """
        path: list[_Node] = []
        for i, piece in enumerate(pieces):
            parent = path[-1] if path else None
            guess = self._by_block.get(block_ids[i]) if i < len(block_ids) else None
            if guess is None or not _is(guess, parent, salt, piece):
                guess = self._by_key.get(self._key(parent, salt, piece))
            # No two contents have the same key, in practice; it costs little to be sure.
            if guess is None or not _is(guess, parent, salt, piece):
                break
            path.append(guess)
        return path

    def _key(self, parent: _Node | None, salt: bytes, piece: bytes) -> bytes:
        above = self._keys.root(salt) if parent is None else parent.key
        return self._keys.block(above, piece)

    def _add(self, nodes: Sequence[_Node]) -> None:
        """Take in a chain of nodes; the first one's parent, where it has one, is there."""
        if not nodes:
            return
        self._pool.remember([node.block for node in nodes])
        for node in nodes:
            self._by_key[node.key] = node
            self._by_block[node.block] = node
            if node.parent is not None:
                node.parent.children[node.key] = node
        if self._on_insert is not None:
            self._on_insert([node.key for node in nodes])

    def _idle_leaves(self, n: int) -> list[_Node]:
        """Unlink up to `n` idle nodes that have no children, or none any more, in order."""
        leaves: list[_Node] = []
        for i in self._idle:
            if len(leaves) == n:
                break
            node = self._by_block[i]
            if not node.children:
                self._unlink(node)
                leaves.append(node)
        return leaves

    def _unlink(self, node: _Node) -> None:
        del self._by_key[node.key]
        del self._by_block[node.block]
        if node.parent is not None:
            del node.parent.children[node.key]


def _is(node: _Node, parent: _Node | None, salt: bytes, piece: bytes) -> bool:
    return node.parent is parent and node.tokens == piece and node.salt == salt


def _subtree(node: _Node) -> list[_Node]:
    """Return the node and all below it, children first."""
    order = [node]
    for member in order:
        order.extend(member.children.values())
    return order[::-1]
