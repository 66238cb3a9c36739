//! Runs in host memory.

use crate::types::{PatPool, PatRowStrides, PatTensors};
use pat_rs::{Element, Error, HostTensors, KvElement, KvScale, Plan, Problem, Result};

/// The memory of a run, as slices of its element types.
pub(crate) struct HostSlices<'a, T, C> {
    pub(crate) q: &'a [T],
    pub(crate) k: &'a [C],
    pub(crate) v: &'a [C],
    pub(crate) k_scale: KvScale<'a>,
    pub(crate) v_scale: KvScale<'a>,
    pub(crate) out: &'a mut [T],
    pub(crate) lse: Option<&'a mut [f32]>,
}

/// Checks what slices would hide: outputs over other tensors, a pool or rows that are not the plan's. Gives what is computed.
pub(crate) fn check(plan: &Plan, problem: Option<Problem>, tensors: &PatTensors) -> Result<Problem> {
    let problem = problem.unwrap_or_else(|| plan.problem());
    check_outputs_are_apart(tensors, problem.shape().kv_heads())?;
    if tensors.num_pages != plan.num_pages() {
        return Err(Error::PlanMismatch {
            what: "tensors.num_pages".into(),
            plan: plan.num_pages().to_string(),
            call: tensors.num_pages.to_string(),
        });
    }
    if tensors.rows < plan.sequence_count() {
        let expected = format!("at least the plan's {}", plan.sequence_count());
        return Err(Error::invalid("tensors.rows", tensors.rows, expected));
    }
    Ok(problem)
}

/// Runs on tensors that were [checked](check).
pub(crate) fn run<T: Element, C: KvElement>(
    plan: &Plan,
    problem: Problem,
    tensors: &PatTensors,
    slices: HostSlices<'_, T, C>,
) -> Result<()> {
    let strides = |strides: PatRowStrides| strides.into();
    let mut host = HostTensors::new(problem, slices.q, slices.k, slices.v)
        .with_kv_strides(tensors.k.strides.into(), tensors.v.strides.into())
        .with_row_strides(strides(tensors.q.strides), strides(tensors.out.strides))
        .with_kv_scales(slices.k_scale, slices.v_scale);
    host.lse_strides = strides(tensors.lse.strides);
    pat_rs::cpu::run(plan, &host, slices.out, slices.lse)
}

/// Refuses outputs that share memory with an input or with each other: slices of them would alias.
fn check_outputs_are_apart(tensors: &PatTensors, kv_heads: u32) -> Result<()> {
    let PatTensors { q, k, v, out, lse, .. } = tensors;
    // Memory that wraps around is refused where slices are made.
    let range = |address: usize, bytes: u64| (address as u64, (address as u64).saturating_add(bytes));
    let factors = |pool: &PatPool| if pool.head_scales.is_null() { 0 } else { u64::from(kv_heads) * 4 };
    let inputs = [
        ("q", q.data.addr(), q.bytes),
        ("k", k.data.addr(), k.bytes),
        ("v", v.data.addr(), v.bytes),
        ("k.head_scales", k.head_scales.addr(), factors(k)),
        ("v.head_scales", v.head_scales.addr(), factors(v)),
    ];
    let outputs = [("out", out.data.addr(), out.bytes), ("lse", lse.data.addr(), lse.bytes)];
    let outputs: Vec<_> = outputs.into_iter().filter(|(_, address, _)| *address != 0).collect();
    for (index, &(name, address, bytes)) in outputs.iter().enumerate() {
        let (begin, end) = range(address, bytes);
        let overlaps = |(_, address, bytes): &&(&str, usize, u64)| {
            let (other_begin, other_end) = range(*address, *bytes);
            begin < other_end && other_begin < end
        };
        if let Some((other, ..)) = inputs.iter().chain(&outputs[..index]).find(overlaps) {
            let expected = "memory of its own";
            return Err(Error::invalid(format!("tensors.{name}"), format!("memory of tensors.{other}"), expected));
        }
    }
    Ok(())
}
