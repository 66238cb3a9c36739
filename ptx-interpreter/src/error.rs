//! What can go wrong, and where.

use std::fmt;

/// Why PTX could not be read or run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The text is not PTX that the interpreter knows.
    #[error("line {line}: {what}\n    {text}")]
    Parse {
        /// Line of the text, from 1 on.
        line: usize,
        /// The statement.
        text: String,
        /// What is wrong with it.
        what: String,
    },
    /// The text has no such entry.
    #[error("there is no entry {0:?}")]
    NoEntry(String),
    /// The launch does not fit the kernel or its limits.
    #[error("launch: {0}")]
    Launch(String),
    /// An instruction did what it must not do.
    #[error("{at}: {fault}")]
    Run {
        /// Which instruction, and who executed it.
        at: Place,
        /// What it did.
        fault: Fault,
    },
    /// No thread of a CTA can go on.
    #[error("CTA {cta}: deadlock\n{}", waiting.join("\n"))]
    Deadlock {
        /// The CTA.
        cta: u32,
        /// Who waits where.
        waiting: Vec<String>,
    },
}

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// An instruction, and the warp that executed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// CTA of the launch.
    pub cta: u32,
    /// Warp of the CTA.
    pub warp: u32,
    /// Line of the text, from 1 on.
    pub line: usize,
    /// The statement.
    pub text: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CTA {}, warp {}, line {} ({})", self.cta, self.warp, self.line, self.text)
    }
}

/// What an instruction did wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// Global memory outside every buffer.
    #[error("lane {lane}: {bytes} bytes of global memory at {address:#x}: {nearest}")]
    OutsideGlobal {
        /// The lane.
        lane: usize,
        /// First byte.
        address: u64,
        /// Size of the access.
        bytes: usize,
        /// What lies there or before it.
        nearest: String,
    },
    /// A write to a buffer that is only read.
    #[error("lane {lane}: a write to {buffer} at {address:#x}, which is only read")]
    ReadOnly {
        /// The lane.
        lane: usize,
        /// First byte.
        address: u64,
        /// The buffer.
        buffer: String,
    },
    /// An access to what another CTA has written.
    #[error("lane {lane}: an access to {buffer} at {address:#x}, which CTA {cta} of the same launch has written")]
    OtherCta {
        /// The lane.
        lane: usize,
        /// The byte.
        address: u64,
        /// The buffer.
        buffer: String,
        /// The CTA that wrote.
        cta: u32,
    },
    /// An address that is not a multiple of the access's size.
    #[error("lane {lane}: {bytes} bytes at {address:#x}, which is no multiple of {bytes}")]
    Misaligned {
        /// The lane.
        lane: usize,
        /// First byte.
        address: u64,
        /// What it must be a multiple of.
        bytes: usize,
    },
    /// Shared memory behind the CTA's end or before its start.
    #[error("lane {lane}: {bytes} bytes of shared memory at {address:#x}; the CTA has {begin:#x} to {end:#x}")]
    OutsideShared {
        /// The lane.
        lane: usize,
        /// First byte.
        address: u64,
        /// Size of the access.
        bytes: usize,
        /// First byte of the CTA's.
        begin: u64,
        /// End of the CTA's.
        end: u64,
    },
    /// Shared memory that holds nothing to be read.
    #[error("lane {lane}: a read of shared memory at {address:#x}, {state}")]
    NotReadable {
        /// The lane.
        lane: usize,
        /// The byte.
        address: u64,
        /// Why.
        state: &'static str,
    },
    /// Two warps access shared memory, one of them writes, and nothing orders them.
    #[error("lane {lane}: {access} of shared memory at {address:#x}, which nothing orders behind {other}")]
    Race {
        /// The lane.
        lane: usize,
        /// The first byte.
        address: u64,
        /// What this warp did.
        access: &'static str,
        /// What the other one did.
        other: String,
    },
    /// TMA or wgmma access shared memory that was written by other instructions, and no fence makes it visible to them.
    #[error(
        "lane {lane}: {access} of shared memory at {address:#x} by TMA or wgmma: no proxy fence stands behind {other}"
    )]
    Unfenced {
        /// The lane.
        lane: usize,
        /// The first byte.
        address: u64,
        /// What TMA or wgmma do.
        access: &'static str,
        /// What was done before.
        other: String,
    },
    /// Lanes that must have arrived never will.
    #[error("lanes {missing:#010x} have exited, which the instruction waits for")]
    Exited {
        /// Mask of the lanes.
        missing: u32,
    },
    /// Lanes that must agree on an operand do not.
    #[error("the lanes disagree on {0}")]
    NotUniform(&'static str),
    /// A barrier was used as it must not be.
    #[error("barrier {id:#x}: {what}")]
    Barrier {
        /// Number of the barrier, or its address in shared memory.
        id: u64,
        /// What is wrong.
        what: String,
    },
    /// Registers of a matrix product of a warpgroup were used as they must not be.
    #[error("wgmma: {0}")]
    Product(&'static str),
    /// A tensor map or matrix descriptor that the interpreter does not know.
    #[error("{0}")]
    Descriptor(String),
    /// The instruction `trap`.
    #[error("the kernel traps")]
    Trap,
    /// More instructions than the launch allows.
    #[error("the CTA has executed {0} instructions")]
    Endless(u64),
}
