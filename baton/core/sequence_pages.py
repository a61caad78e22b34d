"""The pages of sequences: cached prefixes, growth, sharing between choices, publishing, exporting."""

from baton.core.block_pool import BlockPool
from baton.core.page_copies import PageCopies
from baton.core.prefix import block_hash
from baton.core.request import PagesReady, SequenceState
from baton.core.rows import asks_for_prompt


class SequencePages:
    """Changes the block tables of sequences, and nothing else about them but their page counters."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.copies = PageCopies(pool)

    def begin(self, sequence: SequenceState, budget: int) -> int | None:
        """Give a sequence without pages its cached prefix and pages for up to `budget` tokens more.

        Returns how many tokens it may compute, or None, taking nothing, where pages are short.
        """
        # At least one token has to be computed, for its logits.
        is_looked_up = not asks_for_prompt(sequence)
        num_useful = (sequence.num_tokens - 1) // self.block_size if is_looked_up else 0
        hashes = sequence.block_hashes[:num_useful]
        cached = self.pool.find_prefix(hashes)
        start = len(cached) * self.block_size
        count = min(sequence.num_tokens - start, budget)
        missing = self._blocks_for(start + count) - len(cached)
        if missing + self.pool.num_free_among(cached) > self.pool.num_free:
            return None
        self.pool.acquire(cached)
        if is_looked_up:
            self.pool.count_lookup(sequence.num_tokens, start)
        sequence.block_table = cached + self.pool.allocate(missing)
        sequence.num_computed_tokens = start
        sequence.num_published_blocks = len(cached)
        if not sequence.output_token_ids:
            sequence.num_cached_prompt_tokens = start
        return count

    def num_missing(self, sequence: SequenceState, num_tokens: int) -> int:
        """Pages that the sequence lacks to hold `num_tokens` tokens."""
        return self._blocks_for(num_tokens) - len(sequence.block_table)

    def grow(self, sequence: SequenceState, count: int) -> None:
        """Append `count` pages. Raises OutOfBlocks."""
        sequence.block_table.extend(self.pool.allocate(count))

    def share_prompt(self, parent: SequenceState, child: SequenceState) -> bool:
        """Give `child` the prompt's pages of `parent`: full pages shared, the last one copied.

        Returns False, giving nothing, where no page is free for the copy.
        """
        num_full, rest = divmod(parent.num_prompt_tokens, self.block_size)
        if rest and self.pool.num_free == 0:
            return False
        child.block_table = parent.block_table[:num_full]
        child.block_hashes = parent.block_hashes[:num_full]
        self.pool.acquire(child.block_table)
        if rest:
            self.grow(child, 1)
            self.copies.add(parent.block_table[num_full], child.block_table[num_full])
        child.num_computed_tokens = child.num_prompt_tokens
        child.num_published_blocks = num_full
        return True

    def publish(self, sequence: SequenceState) -> None:
        """Let the prefix cache find the pages that became full."""
        for index in range(sequence.num_published_blocks, sequence.num_computed_tokens // self.block_size):
            if index == len(sequence.block_hashes):
                parent = sequence.block_hashes[-1] if index else sequence.request.hash_seed
                tokens = sequence.tokens(index * self.block_size, (index + 1) * self.block_size)
                sequence.block_hashes.append(block_hash(parent, tokens))
            self.pool.publish(sequence.block_table[index], sequence.block_hashes[index])
            sequence.num_published_blocks = index + 1

    def export(self, sequence: SequenceState, *, is_last: bool) -> PagesReady:
        """Hold the pages that became final for their transfer: full ones, and the last one at the end."""
        num_final = sequence.num_computed_tokens
        if not is_last:
            num_final -= num_final % self.block_size
        pages = self._hold_for_export(sequence, num_final, sequence.num_exported_layers, None, is_last)
        sequence.num_exported_blocks += len(pages.blocks)
        return pages

    def export_layers(self, sequence: SequenceState, num_tokens: int, end_layer: int) -> PagesReady:
        """Hold the pages that the step under way completes, of which all layers before `end_layer` are final.

        `num_tokens` are computed when it ends. The rest of the layers come with `export`.
        """
        first_layer, sequence.num_exported_layers = sequence.num_exported_layers, end_layer
        return self._hold_for_export(sequence, num_tokens, first_layer, end_layer, False)

    def num_to_export(self, sequence: SequenceState, num_tokens: int) -> int:
        """Pages of its first `num_tokens` tokens that no step, one under way included, exports before."""
        num_exported = sequence.num_exported_blocks
        if sequence.num_tokens_under_way:
            num_exported = max(num_exported, sequence.num_planned_tokens // self.block_size)
        return max(0, self._blocks_for(num_tokens) - num_exported)

    def _hold_for_export(
        self, sequence: SequenceState, num_tokens: int, first_layer: int, end_layer: int | None, is_last: bool
    ) -> PagesReady:
        first = sequence.num_exported_blocks
        blocks = tuple(sequence.block_table[first : max(first, self._blocks_for(num_tokens))])
        self.pool.acquire(blocks)
        return PagesReady(sequence.request.request_id, first, blocks, first_layer, end_layer, is_last)

    def drop(self, sequence: SequenceState) -> None:
        """Give up the sequence's hold on all its pages."""
        self.copies.cancel(sequence.block_table)
        self.pool.release(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0
        sequence.num_published_blocks = 0

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
