//! Any bytes as a plan's buffer, for the reader that kernels and CPU executor share. No public function of pat-rs takes such bytes: a
//! `Plan` comes from a planner alone. The reader is public, in pat-abi.

use arbitrary::{Result, Unstructured};
use bytemuck::Pod;
use pat_abi::reader::{Exceptions, MergeView, PlanBytes, PlanView};
use pat_abi::{
    FastDivisor, ItemQuery, MergeRow, NO_MASKS, NONE, PLAN_MAGIC, PageMask, PlanHeader, TileVariant, WorkItem,
};

/// Pieces of work, rows, entries and merge rows that are read: the first ones, and the last piece of work.
const MOST: u32 = 16;

/// What the reader gives is what stands in the records, or zeros behind the end of the buffer.
pub(super) fn plan_records(bytes: &[u8]) {
    // Out of bytes: there is no buffer.
    let _ = read(&mut Unstructured::new(bytes));
}

fn read(u: &mut Unstructured<'_>) -> Result<()> {
    let (kv_heads, group) = (u.int_in_range(1..=8)?, u.int_in_range(1..=16)?);
    // Most inputs are plans of this version, whichever that is.
    let has_magic = u.ratio(7, 8)?;
    let mut bytes = u.bytes(u.len())?.to_vec();
    if has_magic && let Some(magic) = bytes.first_chunk_mut() {
        *magic = PLAN_MAGIC.to_ne_bytes();
    }
    let buffer = Buffer(&bytes);
    let header: PlanHeader = buffer.record(0);
    let is_plan = header.magic == PLAN_MAGIC;
    for variant in TileVariant::ALL {
        let view = PlanView::load(PlanBytes(buffer.0), 0, variant, kv_heads);
        let items = header.variants[variant.index()];
        assert_eq!(view.work_count, if is_plan { items.count.wrapping_mul(kv_heads) } else { 0 });
        // A plan has fewer pieces of work than the divisors can divide.
        let last = view.work_count.checked_sub(1).map(|last| last.min(i32::MAX as u32));
        for index in (0..view.work_count.min(MOST)).chain(last) {
            let item = items.begin.wrapping_mul(size_of::<WorkItem>() as u32);
            let item = u64::from(item.wrapping_add(PlanHeader::ITEMS_OFFSET_BYTES))
                + u64::from(index / kv_heads) * size_of::<WorkItem>() as u64;
            let read = Read { buffer, header, view, index, divisors: [kv_heads, group].map(FastDivisor::new) };
            read.work(&buffer.record(item), index % kv_heads);
        }
    }
    let merges = MergeView::load(PlanBytes(buffer.0), 0);
    assert_eq!(merges.count, if is_plan { header.merge_count } else { 0 });
    for index in 0..merges.count.min(MOST) {
        let expected: MergeRow = buffer.element(header.merges_offset_bytes, index);
        assert_eq!(merges.row(PlanBytes(buffer.0), index), expected);
    }
    Ok(())
}

/// The buffer, decoded as records are declared.
#[derive(Clone, Copy)]
struct Buffer<'a>(&'a [u8]);

impl Buffer<'_> {
    /// The record at an address; what is not in the buffer as a whole word is 0.
    fn record<T: Pod>(self, address: u64) -> T {
        let mut record = T::zeroed();
        let rest = usize::try_from(address).ok().and_then(|begin| self.0.get(begin..)).unwrap_or_default();
        let to = bytemuck::bytes_of_mut(&mut record);
        let there = rest.len().min(to.len()) / 4 * 4;
        to[..there].copy_from_slice(&rest[..there]);
        record
    }

    /// Element `index` of the records at an offset.
    fn element<T: Pod>(self, offset_bytes: u32, index: u32) -> T {
        self.record(u64::from(offset_bytes) + u64::from(index) * size_of::<T>() as u64)
    }
}

/// One piece of work.
struct Read<'a> {
    buffer: Buffer<'a>,
    header: PlanHeader,
    view: PlanView,
    index: u32,
    /// KV heads and group.
    divisors: [FastDivisor; 2],
}

impl Read<'_> {
    fn work(&self, item: &WorkItem, kv_head: u32) {
        let Self { buffer, header, ref view, index, divisors: [kv_heads, group] } = *self;
        let words = PlanBytes(buffer.0);
        let work = view.work(words, index, kv_heads);
        let WorkItem { page_begin, token_count, query_begin, row_count, mask_begin, .. } = *item;
        assert_eq!(
            (work.page_begin, work.token_count, work.query_begin, work.row_count, work.mask_begin, work.kv_head),
            (page_begin, token_count, query_begin, row_count, mask_begin, kv_head)
        );
        assert_eq!(work.has_masks(), mask_begin != NO_MASKS);
        for row in 0..row_count.min(MOST) {
            let query: ItemQuery =
                buffer.element(header.queries_offset_bytes, query_begin.wrapping_add(row / group.divisor));
            let (address, head) = view.row(&work, row, group);
            assert_eq!(address.token_and_slot(words), [query.query_token, query.slot]);
            assert_eq!(
                (address.query_token(words), head),
                (query.query_token, kv_head * group.divisor + row % group.divisor)
            );
        }
        let stream = view.stream(&work);
        let exceptions = Exceptions::load(words, 0, view, index, kv_heads);
        // Nothing of a plan but its magic is at 0: the reader takes that address for none.
        let words_at = |begin: u32| match u64::from(header.words_offset_bytes) + u64::from(begin) * 4 {
            address if begin != NONE && address != 0 => Some(address),
            _ => None,
        };
        let (first_tokens, kv_limits) = (words_at(item.first_token_begin), words_at(item.kv_limit_begin));
        let word = |address: Option<u64>, index: u32, default: u32| {
            address.map_or(default, |address| buffer.record(address + u64::from(index) * 4))
        };
        assert_eq!(exceptions.has_first_tokens(), first_tokens.is_some());
        assert_eq!(stream.token_count, token_count);
        for entry in 0..token_count.min(MOST) {
            assert_eq!(
                view.page_id(words, &work, entry),
                buffer.element::<u32>(header.pages_offset_bytes, page_begin.wrapping_add(entry))
            );
            let page_ids = u64::from(header.pages_offset_bytes) + u64::from(page_begin) * 4;
            assert_eq!(stream.page_id(words, entry), buffer.record::<u32>(page_ids + u64::from(entry) * 4));
            if work.has_masks() {
                assert_eq!(
                    view.mask(words, &work, entry),
                    buffer.element::<PageMask>(header.masks_offset_bytes, mask_begin.wrapping_add(entry))
                );
            }
            if stream.has_masks() {
                // Under a window: as far from the masks' as the words are.
                let masks = u64::from(header.masks_offset_bytes) + u64::from(mask_begin) * 4;
                let words_behind = u64::from(header.words_offset_bytes.wrapping_sub(header.masks_offset_bytes));
                let first_token: u32 = buffer.record(masks + words_behind + u64::from(entry) * 4);
                assert_eq!(stream.first_token(words, 0, entry), first_token);
            }
            assert_eq!(exceptions.first_token(words, entry), word(first_tokens, entry, 0));
            assert_eq!(exceptions.kv_limit(words, entry), word(kv_limits, entry, u32::MAX));
        }
    }
}
