"""A decode loop as a serving engine runs it: a page allocator that finds shared prompts, sequences that join and leave, one
plan per step that is advanced, and two layers that share it.

    python examples/decode_loop.py
"""

import torch

import prefix_attn as pa

PAGE_SIZE, NUM_PAGES, LAYERS = 16, 256, 2
Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE = 8, 2, 64, torch.float16
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"


class Allocator:
    """Hands out pages. Full pages of equal tokens behind equal tokens are handed out once, and counted."""

    def __init__(self):
        self.free = list(range(NUM_PAGES - 1, -1, -1))
        self.users, self.of_prefix = {}, {}

    def page(self):
        page = self.free.pop()
        self.users[page] = 1
        return page

    def prompt_pages(self, tokens):
        """Pages for a prompt, and how many of its tokens are in them already."""
        pages = []
        for end in range(PAGE_SIZE, len(tokens) + 1, PAGE_SIZE):
            page = self.of_prefix.get(tuple(tokens[:end]))
            if page is None:
                break
            self.users[page] += 1
            pages.append(page)
        cached = len(pages) * PAGE_SIZE
        for end in range(cached + PAGE_SIZE, len(tokens) + PAGE_SIZE, PAGE_SIZE):
            pages.append(self.page())
            if end <= len(tokens):
                self.of_prefix[tuple(tokens[:end])] = pages[-1]
        return pages, cached

    def release(self, pages):
        for page in pages:
            self.users[page] -= 1
            if self.users[page] == 0:
                del self.users[page]
                self.of_prefix = {prefix: kept for prefix, kept in self.of_prefix.items() if kept != page}
                self.free.append(page)


class Sequence:
    def __init__(self, allocator, tokens, steps):
        self.tokens, self.steps = list(tokens), steps
        self.pages, self.cached = allocator.prompt_pages(self.tokens)

    def append(self, allocator, token):
        if len(self.tokens) == len(self.pages) * PAGE_SIZE:
            self.pages.append(allocator.page())
        self.tokens.append(token)
        self.steps -= 1

    def slot(self, position):
        return self.pages[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE


class Model:
    """Random projections instead of weights: attention is what this is about."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn((1000, HEAD_DIM), generator=generator)
        cache = (NUM_PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
        self.caches = [[torch.zeros(cache, dtype=DTYPE, device=DEVICE) for _ in range(2)] for _ in range(LAYERS)]

    def rows(self, tokens, heads, salt):
        rows = self.embedding[torch.tensor(tokens) % 1000].unsqueeze(1).repeat(1, heads, 1)
        return (rows * torch.arange(1 + salt, 1 + salt + heads).view(1, heads, 1) / heads).to(DTYPE).to(DEVICE)

    def write(self, tokens, slots):
        slots = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
        for layer, (k, v) in enumerate(self.caches):
            pa.append_kv(self.rows(tokens, KV_HEADS, layer), self.rows(tokens, KV_HEADS, layer + 7), k, v, slots)

    def step(self, tokens, plan):
        """The next token of each sequence; any function of the layers' outputs does."""
        outputs = [pa.run(plan, self.rows(tokens, Q_HEADS, layer), *self.caches[layer]) for layer in range(LAYERS)]
        return (sum(out.float().sum(dim=(1, 2)) for out in outputs) * 10).round().long().abs().remainder(1000).tolist()


def main(total_steps=60):
    allocator, model = Allocator(), Model()
    planner = pa.Planner(pa.AttentionShape(Q_HEADS, KV_HEADS, HEAD_DIM, DTYPE), DEVICE)
    system_prompt = [token % 1000 for token in range(100)]
    running, plan, changes = [], None, {}
    for step in range(total_steps):
        if step % 4 == 0 and step < 30:
            sequence = Sequence(allocator, system_prompt + [step * 31 + i for i in range(step % 23)], steps=18)
            new = range(sequence.cached, len(sequence.tokens))
            model.write(sequence.tokens[sequence.cached :], [sequence.slot(position) for position in new])
            running.append(sequence)
        if not running:
            break
        tables, lengths = [sequence.pages for sequence in running], [len(sequence.tokens) for sequence in running]
        if plan is None:
            plan = planner.plan(tables, lengths, PAGE_SIZE, NUM_PAGES)
        else:
            change = planner.advance(plan, tables, lengths)
            changes[change] = changes.get(change, 0) + 1
        tokens = model.step([sequence.tokens[-1] for sequence in running], plan)
        for sequence, token in zip(running, tokens):
            sequence.append(allocator, token)
        model.write(tokens, [sequence.slot(len(sequence.tokens) - 1) for sequence in running])
        for sequence in [sequence for sequence in running if sequence.steps == 0]:
            running.remove(sequence)
            allocator.release(sequence.pages)
    print(f"{step + 1} steps; what changed from step to step: {changes}")
    print(f"{len(allocator.free)} of {NUM_PAGES} pages are free again")
    return changes, len(allocator.free)


if __name__ == "__main__":
    main()
