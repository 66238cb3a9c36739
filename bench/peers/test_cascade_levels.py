"""Levels of cascade attention: every sequence reads each of its tokens once. Needs nothing but Python."""

import random
import unittest

from cascade_levels import MAX_LEVELS, NotExpressible, cascade


def tokens_read(page_size, levels, row):
    """(page, tokens) of all that a row attends to, level by level."""
    read = []
    for level in levels:
        group = next(i for i, end in enumerate(level.qo_indptr[1:]) if row < end)
        pages = level.kv_indices[level.kv_indptr[group] : level.kv_indptr[group + 1]]
        read += [(page, page_size) for page in pages[:-1]]
        read += [(page, level.last_page_len[group]) for page in pages[-1:]]
    return read


def tokens_of(page_size, length, table):
    return [(table[i], min(page_size, length - i * page_size)) for i in range(-(-length // page_size))]


class Levels(unittest.TestCase):
    def check(self, page_size, lengths, tables):
        result = cascade(page_size, lengths, tables)
        self.assertEqual(sorted(result.order), list(range(len(lengths))))
        for level in result.levels:
            self.assertEqual(level.qo_indptr[-1], len(lengths))
            self.assertEqual(len(level.kv_indptr), len(level.qo_indptr))
            self.assertEqual(len(level.last_page_len), len(level.qo_indptr) - 1)
        for row, sequence in enumerate(result.order):
            expected = tokens_of(page_size, lengths[sequence], tables[sequence])
            self.assertEqual(tokens_read(page_size, result.levels, row), expected)
        return result

    def test_a_regular_tree_has_its_own_levels(self):
        tables = [[7, 1, 2], [7, 3, 4], [7, 1, 5], [7, 3, 6]]
        result = self.check(16, [40] * 4, tables)
        self.assertEqual(result.order, [0, 2, 1, 3])
        self.assertEqual([level.qo_indptr for level in result.levels], [[0, 4], [0, 2, 4], [0, 1, 2, 3, 4]])
        self.assertEqual([level.kv_indices for level in result.levels], [[7], [1, 3], [2, 5, 4, 6]])
        self.assertEqual(result.levels[2].last_page_len, [8] * 4)

    def test_without_sharing_there_is_one_level(self):
        self.assertEqual(len(self.check(16, [20, 16, 1], [[0, 1], [2], [3]]).levels), 1)

    def test_shorter_paths_and_ends_at_inner_nodes(self):
        tables = [[0, 1, 2], [0, 1, 3], [0, 1], [0, 4], [5], [0, 1, 2]]
        result = self.check(8, [24, 24, 16, 12, 3, 24], tables)
        self.assertEqual(len(result.levels), 4)

    def test_a_shared_partial_page_is_read_by_each(self):
        result = self.check(16, [20, 18], [[0, 1], [0, 1]])
        self.assertEqual([level.kv_indices for level in result.levels], [[0], [1, 1]])

    def test_random_forests(self):
        draw = random.Random(1)
        expressible = 0
        for _ in range(300):
            page_size, tables, lengths = draw.choice([1, 16]), [], []
            for sequence in range(draw.randint(1, 12)):
                parent = draw.choice(tables) if tables else []
                table = parent[: draw.randint(0, len(parent))]
                table = table + [1000 * sequence + i for i in range(draw.randint(0 if table else 1, 3))]
                tables.append(table)
                lengths.append(len(table) * page_size - draw.randint(0, page_size - 1))
            try:
                self.check(page_size, lengths, tables)
                expressible += 1
            except NotExpressible:
                pass
        self.assertGreater(expressible, 250)

    def test_what_is_not_expressible_says_why(self):
        with self.assertRaisesRegex(NotExpressible, "empty"):
            cascade(16, [16, 0], [[0], []])
        chain = [list(range(n + 1)) for n in range(MAX_LEVELS + 2)]
        with self.assertRaisesRegex(NotExpressible, f"{MAX_LEVELS + 2} levels"):
            cascade(1, [len(table) for table in chain], chain)


if __name__ == "__main__":
    unittest.main()
