//! How the query heads of a KV head lie in tiles: their group, in one part or several.

use crate::TileVariant;

/// The parts of a group: as few as hold it, of equally many rows, so that each fits a tile. A group that fits is one part.
///
/// Where there are several, an item has the rows of one query and one part. The records are the same for all parts: the kernel is
/// launched once for each of them, with every address that depends on the head moved to the part's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupParts {
    group: u32,
    /// Rows of each.
    pub rows: u32,
    /// Their number.
    pub count: u32,
}

impl GroupParts {
    /// Of a group of `group` query heads, at least 1, in tiles of `variant`.
    pub const fn new(group: u32, variant: TileVariant) -> Self {
        let count = group.div_ceil(variant.rows());
        Self { group, rows: group.div_ceil(count), count }
    }

    /// The first head, within the group, of each part. The last part begins early enough to be as large as the others: what it
    /// has in common with the one before it is computed twice, with the same result.
    pub fn first_heads(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |part| (part * self.rows).min(self.group - self.rows))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use std::vec::Vec;

    #[test]
    fn parts_fit_tiles_and_cover_their_group() {
        let parts = |group, variant| {
            let parts = GroupParts::new(group, variant);
            (parts.rows, parts.first_heads().collect::<Vec<_>>())
        };
        assert_eq!(parts(8, TileVariant::Mma16), (8, [0].into()));
        assert_eq!(parts(128, TileVariant::Mma128), (128, [0].into()));
        assert_eq!(parts(256, TileVariant::Wgmma128), (128, [0, 128].into()));
        assert_eq!(parts(131, TileVariant::Mma128), (66, [0, 65].into()));
        for group in (1..600).chain([65_535]) {
            for variant in TileVariant::ALL {
                let (rows, first_heads) = parts(group, variant);
                assert!((1..=variant.rows()).contains(&rows));
                assert_eq!(first_heads.len() as u32, group.div_ceil(variant.rows()));
                assert!(first_heads.windows(2).all(|pair| pair[0] < pair[1] && pair[1] <= pair[0] + rows));
                assert_eq!((first_heads[0], first_heads.last().unwrap() + rows), (0, group));
            }
        }
    }
}
