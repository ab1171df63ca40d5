/** Who is in a batch's rows, and whether the engine's rows hold what the batch believes. */
#pragma once

#include "fake_engine.h"
#include "generation/batch.h"

namespace qwen_aot
{

struct BatchInspector
{
    static ActiveSequence const* occupant(Batch const& batch, int32_t row) { return batch.at(row).sequence.get(); }

    static void check_rows(Batch const& batch, FakeEngine const& engine)
    {
        for (int32_t row = 0; row < batch.num_rows_; ++row)
        {
            auto const& cache = engine.rows[static_cast<size_t>(row)];
            std::vector<int32_t> expected;
            if (ActiveSequence const* const sequence = batch.at(row).sequence.get(); sequence != nullptr)
            {
                expected.assign(sequence->prompt().begin(), sequence->prompt().begin() + sequence->prefilled());
                if (sequence->is_prefilled())
                {
                    expected.insert(expected.end(), sequence->tokens().begin(), sequence->tokens().end() - 1);
                }
            }
            else if (ActiveSequence const* const held = batch.at(row).held.get(); held != nullptr)
            {
                expected.assign(held->prompt().begin(), held->prompt().end());
                expected.insert(expected.end(), held->tokens().begin(), held->tokens().end());
                FakeEngine::require(held->kept > 0 && held->kept <= expected.size());
                expected.resize(held->kept);
            }
            FakeEngine::require(cache == expected);
        }
        size_t open = 0;
        for (ActiveSequence const* each = batch.waiting_.front(); each != nullptr; each = each->next.get())
        {
            ++open;
        }
        for (Batch::PendingChoices const& pending : batch.pending_)
        {
            FakeEngine::require(!pending.sequences.empty());
            for (ActiveSequence const* each = pending.sequences.front(); each != nullptr; each = each->next.get())
            {
                ++open;
            }
        }
        for (Batch::Row const& row : batch.rows_)
        {
            open += row.sequence != nullptr ? 1 : 0;
        }
        FakeEngine::require(open == batch.num_open_);
    }
};

} // namespace qwen_aot
