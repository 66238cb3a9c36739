//! Decoded instructions: registers, constants and special registers are all slots of a warp's register file.

use crate::lanewise::Lanewise;
use crate::order::Fence;

/// Index into a warp's registers.
pub(crate) type Slot = u32;

/// A predicate and its value in the lanes that execute an instruction.
pub(crate) type Guard = (Slot, bool);

/// An instruction with its guard.
#[derive(Clone, Debug)]
pub(crate) struct Instruction {
    pub(crate) guard: Option<Guard>,
    pub(crate) op: Op,
    /// Line of the text.
    pub(crate) line: usize,
    /// The statement.
    pub(crate) text: String,
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Global,
    Shared,
}

/// The 16-bit type of a matrix product's operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixType {
    F16,
    Bf16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shuffle {
    Index,
    Butterfly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    Any,
    All,
    Ballot,
}

/// A place in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) base: Slot,
    pub(crate) offset: i64,
}

/// Where A of a product of a warpgroup is: in registers, or in shared memory where a descriptor says.
#[derive(Clone, Copy, Debug)]
pub(crate) enum WgmmaA {
    Registers([Slot; 4]),
    Shared(Slot),
}

impl WgmmaA {
    /// Registers that the product reads as it goes on.
    pub(crate) fn registers(&self) -> &[Slot] {
        match self {
            Self::Registers(slots) => slots,
            Self::Shared(_) => &[],
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Each lane on its own.
    Lanewise {
        function: Lanewise,
        to: Slot,
        from: [Slot; 3],
    },
    /// `mov` of halves of `bits` bits each into a register.
    Pack {
        to: Slot,
        halves: [Slot; 2],
        bits: u32,
    },
    /// The reverse.
    Unpack {
        halves: [Option<Slot>; 2],
        from: Slot,
        bits: u32,
    },
    LoadParam {
        to: Slot,
        offset: usize,
        bytes: usize,
    },
    Load {
        space: Space,
        to: Vec<Slot>,
        from: Address,
        bytes: usize,
    },
    Store {
        space: Space,
        to: Address,
        from: Vec<Slot>,
        bytes: usize,
    },
    Branch {
        target: usize,
    },
    Exit,
    Trap,
    /// Hints, and what is about time alone.
    Nothing,
    /// What the async proxy sees.
    Fence {
        of: Fence,
    },
    Shuffle {
        kind: Shuffle,
        to: Slot,
        from: Slot,
        lane: Slot,
        clamp: Slot,
        members: Slot,
    },
    Vote {
        kind: Vote,
        to: Slot,
        from: Slot,
        members: Slot,
    },
    /// All lanes' values, combined by or.
    Reduce {
        to: Slot,
        from: Slot,
        members: Slot,
    },
    WarpBarrier {
        members: Slot,
    },
    /// `threads`: all of the CTA where `None`. `aligned`: all warps come to this very instruction.
    CtaBarrier {
        id: Slot,
        threads: Option<Slot>,
        aligned: bool,
    },
    /// An arrival at such a barrier that does not wait.
    ArriveAtCtaBarrier {
        id: Slot,
        threads: Slot,
    },
    CopyAsync {
        to: Address,
        from: Address,
        bytes: usize,
        source_bytes: Option<Slot>,
    },
    CommitCopies,
    WaitCopies {
        open_groups: usize,
    },
    LoadMatrices {
        to: [Slot; 4],
        from: Address,
        transposed: bool,
    },
    Mma {
        of: MatrixType,
        d: [Slot; 4],
        a: [Slot; 4],
        b: [Slot; 2],
        c: [Slot; 4],
    },
    Wgmma {
        of: MatrixType,
        d: Vec<Slot>,
        a: WgmmaA,
        b: Slot,
        adds: Slot,
        transposed: bool,
    },
    FenceProducts,
    CommitProducts,
    WaitProducts {
        open_groups: usize,
    },
    InitBarrier {
        at: Address,
        count: Slot,
    },
    Arrive {
        at: Address,
    },
    ArriveExpecting {
        at: Address,
        bytes: Slot,
    },
    ArriveAfterCopies {
        at: Address,
    },
    TryWait {
        to: Slot,
        at: Address,
        parity: Slot,
    },
    CopyTensor {
        to: Address,
        map: Address,
        coordinates: [Slot; 4],
        barrier: Address,
    },
}

impl Op {
    /// Whether all lanes of the warp execute it together (`.sync.aligned`), which its own operands do not say.
    pub(crate) fn wants_all_lanes(&self) -> bool {
        matches!(
            self,
            Self::LoadMatrices { .. }
                | Self::Mma { .. }
                | Self::FenceProducts
                | Self::Wgmma { .. }
                | Self::CommitProducts
                | Self::WaitProducts { .. }
        )
    }
}
