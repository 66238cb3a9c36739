//! Reading the tensors of other libraries: torch's by their attributes, everybody else's by DLPack.

use crate::device::Device;
use crate::errors::{Failure, Result, has_gradient, invalid, own_error, type_name, wrong_type};
use crate::foreign;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyTuple, PyType};
use std::fmt;

/// Most dimensions of a tensor that is taken: those of a KV cache.
pub(crate) const MAX_RANK: usize = 4;

/// The element types that anything here takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F16,
    Bf16,
    F32,
    I32,
    I64,
    /// Any bytes: how some engines keep 8-bit caches.
    U8,
    E4m3,
    E5m2,
    Other(String),
}

impl Element {
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
            Self::U8 | Self::E4m3 | Self::E5m2 => 1,
            Self::Other(_) => 0,
        }
    }
}

impl From<pat_rs::Dtype> for Element {
    fn from(dtype: pat_rs::Dtype) -> Self {
        match dtype {
            pat_rs::Dtype::F16 => Self::F16,
            pat_rs::Dtype::Bf16 => Self::Bf16,
            pat_rs::Dtype::E4m3 => Self::E4m3,
            pat_rs::Dtype::E5m2 => Self::E5m2,
            other => Self::Other(crate::shape::dtype_name(other).into()),
        }
    }
}

impl fmt::Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::I32 => "int32",
            Self::I64 => "int64",
            Self::U8 => "uint8",
            Self::E4m3 => "float8_e4m3fn",
            Self::E5m2 => "float8_e5m2",
            Self::Other(name) => name,
        })
    }
}

/// A tensor as it was when it was read. It stays what it is as long as this lives and no other Python code runs: `owner` holds
/// the memory, and only Python code can resize it.
#[derive(Debug)]
pub(crate) struct Tensor<'py> {
    /// The argument's name, for errors.
    pub(crate) name: &'py str,
    pub(crate) address: u64,
    pub(crate) element: Element,
    pub(crate) device: Device,
    pub(crate) is_writable: bool,
    pub(crate) rank: usize,
    pub(crate) sizes: [i64; MAX_RANK],
    /// In elements.
    pub(crate) strides: [i64; MAX_RANK],
    /// Whether reading it runs code of others: a DLPack producer's, or that of a class below torch's.
    pub(crate) runs_code: bool,
    /// The tensor (torch's, numpy's), or the DLPack capsule that holds it.
    pub(crate) owner: Bound<'py, PyAny>,
}

impl<'py> Tensor<'py> {
    /// Reads a torch tensor or a DLPack producer. `stream` (torch's current one where it is not named) is what work on a DLPack
    /// producer's memory is going to be ordered by: it makes that stream wait for its own.
    pub(crate) fn read(name: &'py str, object: &Bound<'py, PyAny>, stream: Option<u64>) -> Result<Self> {
        let read = if is_torch(object)? {
            Self::read_torch(name, object)?
        } else {
            let read = foreign::read_dlpack(name, object, stream)?;
            // The array owns its memory, without its capsule, too.
            if is_plain_numpy(object) { Self { runs_code: false, owner: object.clone(), ..read } } else { read }
        };
        read.check_address(object)?;
        Ok(read)
    }

    /// Reads a tensor that torch has just made for this call: none that has to be refused.
    pub(crate) fn read_own(name: &'py str, object: &Bound<'py, PyAny>) -> Result<Self> {
        match foreign::TorchExchange::get(object.py())? {
            Some(exchange) => match exchange.read(name, object)? {
                Some(read) => Ok(Self { runs_code: false, ..read }),
                None => Self::read(name, object, None),
            },
            None => Self::read(name, object, None),
        }
    }

    /// Refuses memory that is not there.
    fn check_address(&self, object: &Bound<'py, PyAny>) -> Result<()> {
        if self.sizes[..self.rank].contains(&0) {
            return Ok(());
        }
        if self.address == 0 {
            let got = format!("a {} without memory (its address is 0)", type_name(object));
            return Err(invalid(self.name, got, "a tensor whose elements are in memory"));
        }
        let bytes = self.span_elements()? * self.element.bytes();
        if self.address.checked_add(bytes).is_none() {
            let got = format!("{bytes} bytes at address {:#x}", self.address);
            return Err(invalid(self.name, got, "a tensor whose elements are in memory"));
        }
        Ok(())
    }

    /// Reads torch's tensors and numpy's arrays of a call anew where reading others has run code that may have resized them.
    pub(crate) fn settle<'a>(tensors: impl IntoIterator<Item = &'a mut Self>) -> Result<()>
    where
        'py: 'a,
    {
        let tensors: Vec<_> = tensors.into_iter().collect();
        if tensors.iter().any(|tensor| tensor.runs_code) {
            for tensor in tensors.into_iter().filter(|tensor| !tensor.runs_code) {
                *tensor = Self::read(tensor.name, &tensor.owner.clone(), None)?;
            }
        }
        Ok(())
    }

    fn read_torch(name: &'py str, tensor: &Bound<'py, PyAny>) -> Result<Self> {
        let py = tensor.py();
        let is_negative = tensor.call_method0(intern!(py, "is_neg")).and_then(|negative| negative.is_truthy());
        if is_negative.map_err(|error| without_memory(name, tensor, error.into()))? {
            let expected = "one whose memory holds its values (tensor.resolve_neg())";
            return Err(invalid(name, "a tensor that is the negative of its memory", expected));
        }
        if tensor.getattr(intern!(py, "requires_grad"))?.is_truthy()? {
            return Err(has_gradient(name));
        }
        let read = match foreign::TorchExchange::get(py)? {
            Some(exchange) => exchange.read(name, tensor)?,
            None => None,
        };
        let read = match read {
            Some(read) => read,
            None => Self::read_attributes(name, tensor).map_err(|failure| without_memory(name, tensor, failure))?,
        };
        let read = Self { runs_code: !is_plain_torch(tensor), ..read };
        read.check_storage(tensor)?;
        Ok(read)
    }

    /// Before torch 2.10, and for the error message where the tensor is none that is taken.
    fn read_attributes(name: &'py str, tensor: &Bound<'py, PyAny>) -> Result<Self> {
        let py = tensor.py();
        let device = if tensor.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
            Device::Cuda(tensor.call_method0(intern!(py, "get_device"))?.extract()?)
        } else if tensor.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            Device::Cpu
        } else {
            return Err(invalid(name, format!("a tensor on {}", tensor.getattr("device")?), "one on cpu or cuda"));
        };
        let shape = tensor.getattr(intern!(py, "shape"))?;
        let strides = tensor.call_method0(intern!(py, "stride"))?;
        let (shape, strides) =
            (shape.cast::<PyTuple>().map_err(PyErr::from)?, strides.cast::<PyTuple>().map_err(PyErr::from)?);
        let rank = shape.len();
        check_rank(name, rank)?;
        let mut read = Self {
            name,
            address: tensor.call_method0(intern!(py, "data_ptr"))?.extract()?,
            element: torch_element(&tensor.getattr(intern!(py, "dtype"))?)?,
            device,
            is_writable: true,
            rank,
            sizes: [0; MAX_RANK],
            strides: [0; MAX_RANK],
            runs_code: true,
            owner: tensor.clone(),
        };
        for dim in 0..rank {
            read.sizes[dim] = shape.get_item(dim)?.extract()?;
            read.strides[dim] = strides.get_item(dim)?.extract()?;
        }
        Ok(read)
    }

    /// Refuses a CPU tensor whose storage has been made smaller than its sizes, which torch allows: reading it would end the
    /// process. (On a device torch itself does not look, and a storage without memory has address 0.)
    fn check_storage(&self, tensor: &Bound<'py, PyAny>) -> Result<()> {
        if self.device != Device::Cpu {
            return Ok(());
        }
        let py = tensor.py();
        let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
        let bytes: u64 = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
        let offset: u64 = tensor.call_method0(intern!(py, "storage_offset"))?.extract()?;
        let span = self.span_elements()?;
        let needed = (offset + span) * self.element.bytes();
        // A view of no elements may begin behind its storage's end: a slice of a fused projection's rows when there are none.
        if span == 0 || needed <= bytes {
            return Ok(());
        }
        let got = format!("a tensor of {needed} bytes whose storage was resized to {bytes}");
        Err(invalid(self.name, got, "a tensor that lies in its storage"))
    }

    /// The sizes, as Python shows them.
    pub(crate) fn shape(&self) -> String {
        format!("{:?}", &self.sizes[..self.rank])
    }

    /// Elements from the first to the last one that is addressed, or why they are no range from the address on.
    pub(crate) fn span_elements(&self) -> Result<u64> {
        let (sizes, strides) = (&self.sizes[..self.rank], &self.strides[..self.rank]);
        if sizes.contains(&0) {
            return Ok(0);
        }
        let mut last = 0i128;
        for (&size, &stride) in sizes.iter().zip(strides) {
            if stride < 0 {
                return Err(invalid(self.name, format!("strides {strides:?}"), "none below 0"));
            }
            last += i128::from(size - 1) * i128::from(stride);
        }
        u64::try_from(last + 1)
            .ok()
            .filter(|elements| elements.checked_mul(self.element.bytes()).is_some_and(|bytes| bytes < 1 << 63))
            .ok_or_else(|| invalid(self.name, format!("strides {strides:?}"), "what memory can hold"))
    }

    /// Refuses another element type.
    pub(crate) fn expect_element(&self, expected: &Element) -> Result<()> {
        if self.element == *expected {
            return Ok(());
        }
        Err(wrong_type(self.name, format!("a tensor of {}", self.element), &expected.to_string()))
    }

    /// Refuses another element type of a KV cache; bytes are what the caller says they are.
    pub(crate) fn expect_stored(&self, expected: &Element) -> Result<()> {
        if self.element == Element::U8 && matches!(expected, Element::E4m3 | Element::E5m2) {
            return Ok(());
        }
        self.expect_element(expected)
    }

    /// Refuses another device.
    pub(crate) fn expect_device(&self, expected: Device, why: &str) -> Result<()> {
        if self.device == expected {
            return Ok(());
        }
        Err(invalid(self.name, format!("a tensor on {}", self.device), format!("one on {expected}, {why}")))
    }

    /// Refuses memory that must not be written.
    pub(crate) fn expect_writable(&self) -> Result<()> {
        if self.is_writable {
            return Ok(());
        }
        Err(invalid(self.name, "read-only memory", "memory that can be written"))
    }
}

/// Tensors of torch that have no memory of their own (sparse, nested, of a transformation) say so in exceptions of many kinds.
fn without_memory(name: &str, tensor: &Bound<'_, PyAny>, failure: Failure) -> Failure {
    let (py, error) = (tensor.py(), PyErr::from(failure));
    if error.is_instance_of::<PyValueError>(py) || error.is_instance_of::<PyTypeError>(py) {
        return error.into();
    }
    let layout = tensor.getattr(intern!(py, "layout")).map_or_else(|_| String::new(), |layout| layout.to_string());
    let what = match &*layout {
        "" | "torch.strided" => type_name(tensor),
        _ => format!("{layout} tensor"),
    };
    let refusal = wrong_type(name, format!("a {what} without memory of its own"), "a dense tensor");
    refusal.caused_by(py, error)
}

/// Refuses tensors of more dimensions than any argument has.
pub(crate) fn check_rank(name: &str, rank: usize) -> Result<()> {
    if rank <= MAX_RANK {
        return Ok(());
    }
    Err(invalid(name, format!("{rank} dimensions"), format!("at most {MAX_RANK}")))
}

/// `torch.Tensor`, once torch is in use.
static TENSOR: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// Whether it is a `torch.Tensor`. torch is not imported for it.
pub(crate) fn is_torch(object: &Bound<'_, PyAny>) -> Result<bool> {
    let py = object.py();
    if TENSOR.get(py).is_none() && !torch_is_imported(py)? {
        return Ok(false);
    }
    let class = TENSOR.import(py, "torch", "Tensor")?;
    if object.get_type().is(class) {
        return Ok(true);
    }
    // A class below torch's may lie about its objects.
    Ok(object.is_instance(class).or_else(|error| own_error(py, error).map(|_| false))?)
}

/// Whether it is of torch's class itself, none below that.
fn is_plain_torch(object: &Bound<'_, PyAny>) -> bool {
    TENSOR.get(object.py()).is_some_and(|class| object.get_type().is(class))
}

/// Whether it is of numpy's class itself, none below that.
fn is_plain_numpy(object: &Bound<'_, PyAny>) -> bool {
    let py = object.py();
    let class =
        imported(py).and_then(|modules| modules.get_item(intern!(py, "numpy"))?.getattr(intern!(py, "ndarray")));
    class.is_ok_and(|class| object.get_type().is(&class))
}

/// Whether the program has imported torch.
pub(crate) fn torch_is_imported(py: Python<'_>) -> Result<bool> {
    Ok(imported(py)?.contains(intern!(py, "torch"))?)
}

/// The modules that the program has imported, by name.
pub(crate) fn imported(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    py.import(intern!(py, "sys"))?.getattr(intern!(py, "modules"))
}

/// torch has one object for each of its dtypes.
fn torch_element(dtype: &Bound<'_, PyAny>) -> Result<Element> {
    static KNOWN: PyOnceLock<[(Py<PyAny>, Element); 8]> = PyOnceLock::new();
    let py = dtype.py();
    let known = KNOWN.get_or_try_init(py, || -> PyResult<_> {
        let torch = py.import("torch")?;
        let dtype = |name: &str| torch.getattr(name).map(Bound::unbind);
        Ok([
            (dtype("float16")?, Element::F16),
            (dtype("bfloat16")?, Element::Bf16),
            (dtype("float32")?, Element::F32),
            (dtype("int32")?, Element::I32),
            (dtype("int64")?, Element::I64),
            (dtype("uint8")?, Element::U8),
            (dtype("float8_e4m3fn")?, Element::E4m3),
            (dtype("float8_e5m2")?, Element::E5m2),
        ])
    })?;
    match known.iter().find(|(object, _)| object.is(dtype)) {
        Some((_, element)) => Ok(element.clone()),
        None => Ok(Element::Other(dtype.str()?.to_string_lossy().trim_start_matches("torch.").to_owned())),
    }
}
