#include "generation/batch.h"

#include "generation/stopping.h"
#include "system/system.h"

#include <algorithm>

namespace qwen_aot
{
namespace
{

// Tokens of a prompt in one step: what running streams wait for, and what no one waits for. docs/scheduling.md has the
// measurements.
constexpr size_t kChunkBesideDecode = 64;
constexpr size_t kChunkAlone = 256;
constexpr size_t kTokensPerIdleRow = 192; // an idle row in a decode step costs about as much as copying so many
constexpr size_t kCopyTokens = 1024;      // a step admits no more once it has copied so many
// Of a prompt so many tokens are computed whatever the cache holds. The last one's logits are needed; and a step of one token
// runs other kernels than a chunk, which round otherwise: two, and an answer is the same as without a cache.
constexpr size_t kAlwaysComputed = 2;
constexpr size_t kEventsOfChoice = 3; // in one step, at most: one token as it begins, one of a decode, its end
constexpr size_t kNone = static_cast<size_t>(-1);

/** How many tokens of a list are among the first `length` of a prompt and what follows it, from their beginning on; but for those
 *  that are always computed. */
size_t common_beginning(Array<int32_t> const& list, ActiveSequence const& content, size_t length)
{
    size_t const prompt = content.prompt().size();
    size_t const most = std::min(list.size() - std::min(list.size(), kAlwaysComputed), length);
    size_t i = 0;
    while (i < most && list[i] == (i < prompt ? content.prompt()[i] : content.tokens()[i - prompt]))
    {
        ++i;
    }
    return i;
}

Status check_ids(char const* where, Span<int32_t const> ids, size_t vocab_size, Error& error)
{
    for (int32_t const id : ids)
    {
        if (id < 0 || static_cast<size_t>(id) >= vocab_size)
        {
            return error.fail(
                Status::invalid_argument, "%s has the token id %d; accepted: 0 to %zu", where, id, vocab_size - 1);
        }
    }
    return Status::ok;
}

/** Refuses settings that leave no token to choose. */
Status check_choosable(Settings const& settings, Span<int32_t const> ending_ids, size_t vocab_size, Error& error)
{
    if (settings.suppress_tokens.size() + ending_ids.size() < vocab_size)
    {
        return Status::ok;
    }
    Array<int32_t> impossible;
    QWEN_AOT_NEED(impossible.append(settings.suppress_tokens.data(), settings.suppress_tokens.size()), error,
        "the tokens that may not come");
    if (settings.min_new_tokens > 0)
    {
        QWEN_AOT_NEED(impossible.append(ending_ids.data(), ending_ids.size()), error, "the tokens that may not come");
    }
    // By an order of our own: that of int is compiled into some C++ libraries, and not into ours.
    std::sort(impossible.begin(), impossible.end(), [](int32_t a, int32_t b) { return a < b; });
    auto const end = std::unique(impossible.begin(), impossible.end());
    auto const inside =
        std::count_if(impossible.begin(), end, [&](int32_t id) { return static_cast<size_t>(id) < vocab_size; });
    if (static_cast<size_t>(inside) == vocab_size)
    {
        return error.fail(Status::invalid_argument,
            "suppress_tokens (and min_new_tokens, which holds back the ids that end a text) leaves none of the %zu "
            "tokens to choose: suppress fewer",
            vocab_size);
    }
    return Status::ok;
}

uint64_t fresh_seed()
{
    uint64_t seed;
    system::random_bytes(&seed, sizeof seed);
    return seed;
}

} // namespace

Status Batch::create(
    Engine& engine, Tokenizer const* tokenizer, GenerationDefaults const& defaults, Box<Batch>& batch, Error& error)
{
    Box<Batch> fresh = make<Batch>(engine, tokenizer, defaults);
    QWEN_AOT_NEED(fresh != nullptr, error, "a batch");
    auto const rows = static_cast<size_t>(fresh->num_rows_);
    bool const had_memory = fresh->memory_.allocate(fresh->vocab_size_) && fresh->rows_.resize(rows)
        && fresh->prefilling_.reserve(rows) && fresh->running_.reserve(rows) && fresh->ids_.reserve(rows)
        && fresh->bad_rows_.reserve(rows);
    QWEN_AOT_NEED(had_memory, error, "choosing tokens");
    batch = std::move(fresh);
    return Status::ok;
}

Batch::Batch(Engine& engine, Tokenizer const* tokenizer, GenerationDefaults const& defaults)
    : engine_(engine)
    , tokenizer_(tokenizer)
    , defaults_(defaults)
    , vocab_size_(static_cast<size_t>(engine.manifest().vocab_size))
    , num_rows_(static_cast<int32_t>(engine.manifest().max_batch))
{
}

Batch::~Batch() = default;

/** Completes a request's settings and checks it; writes what its choices share. */
Status Batch::check(Request const& request, ActiveRequest& active, Error& error) const
{
    Manifest const& manifest = engine_.manifest();
    Settings settings;
    QWEN_AOT_TRY(defaults_.complete(request.config, request.is_chat, 1, settings, error));
    if (tokenizer_ == nullptr && (request.is_text || !settings.stop.empty()))
    {
        return error.fail(Status::unsupported,
            "the bundle has no compiled tokenizer, so it takes and gives token ids only: give the prompt as ids, "
            "without stop texts (the bundle's own are %s), or rebuild it from a checkpoint with tokenizer.json",
            defaults_.stop.empty() ? "none" : "dropped by clearing them");
    }
    if (request.is_text)
    {
        QWEN_AOT_TRY(tokenizer_->encode(request.text, true, active.prompt, error));
    }
    else
    {
        QWEN_AOT_NEED(active.prompt.append(request.ids.data(), request.ids.size()), error, "a prompt");
    }
    if (active.prompt.empty())
    {
        if (manifest.bos_token_id < 0)
        {
            return error.fail(Status::invalid_argument,
                "the prompt is empty and the model has no BOS token: give at least one token");
        }
        QWEN_AOT_NEED(active.prompt.push(static_cast<int32_t>(manifest.bos_token_id)), error, "a prompt");
    }
    QWEN_AOT_TRY(check_ids("the prompt", active.prompt.view(), vocab_size_, error));
    for (Bias const& each : settings.logit_bias)
    {
        QWEN_AOT_TRY(check_ids("logit_bias", {&each.id, 1}, vocab_size_, error));
    }
    QWEN_AOT_TRY(check_ids("suppress_tokens", settings.suppress_tokens.view(), vocab_size_, error));
    QWEN_AOT_TRY(check_ids("stop_token_ids", settings.stop_token_ids.view(), vocab_size_, error));
    QWEN_AOT_NEED(qwen_aot::ending_ids(settings, tokenizer_, active.ending_ids), error, "the ids that end a text");
    QWEN_AOT_TRY(check_choosable(settings, active.ending_ids.view(), vocab_size_, error));
    auto const length = static_cast<int64_t>(active.prompt.size());
    if (length > manifest.max_context)
    {
        return error.fail(Status::context_full,
            "the prompt has %lld tokens, the context holds %lld: shorten it, or rebuild the bundle with --max-context "
            "%lld or more",
            static_cast<long long>(length), static_cast<long long>(manifest.max_context),
            static_cast<long long>(length));
    }
    // The last token needn't fit: it is never fed.
    QWEN_AOT_TRY(
        defaults_.complete(request.config, request.is_chat, manifest.max_context - length + 1, active.settings, error));
    active.keep_cache = request.keep_cache;
    active.cache_scope = request.cache_scope;
    if (active.has_prompt_logprobs())
    {
        QWEN_AOT_NEED(active.prompt_logprobs.begin(static_cast<size_t>(active.settings.prompt_logprobs), true), error,
            "log-probabilities");
    }
    return Status::ok;
}

Status Batch::add(Request const& request, uint64_t* id, Error& error)
{
    Ref<ActiveRequest> active(make<ActiveRequest>(marks_));
    QWEN_AOT_NEED(active, error, "a request");
    QWEN_AOT_TRY(check(request, *active, error));
    active->arrived = system::seconds();

    auto const choices = static_cast<size_t>(active->settings.n);
    SequenceQueue first;
    PendingChoices others;
    others.request = active;
    for (size_t choice = 0; choice < choices; ++choice)
    {
        Given<uint64_t> const& seed = active->settings.seed;
        Box<ActiveSequence> sequence = make<ActiveSequence>(
            active, static_cast<int32_t>(choice), seed.is_given ? seed.value : fresh_seed(), tokenizer_);
        QWEN_AOT_NEED(sequence != nullptr && sequence->begin(), error, "a request");
        (choice == 0 ? first : others.sequences).push(std::move(sequence));
    }
    QWEN_AOT_NEED(choices == 1 || others.logits.resize(vocab_size_), error, "a request's choices");
    // What happens to it later needs no memory for its events: the last one comes whatever fails.
    QWEN_AOT_NEED(reserve_events((num_open_ + choices) * kEventsOfChoice) && pending_.reserve_more(1)
            && active->begin(count_ + 1),
        error, "a request's events");

    ++count_;
    num_open_ += choices;
    active->num_open = static_cast<int32_t>(choices);
    waiting_.push(first.pop());
    if (choices > 1)
    {
        (void)pending_.push(std::move(others)); // there is room
    }
    *id = count_;
    return Status::ok;
}

Span<Event const> Batch::step()
{
    free_ended();
    retire_cancelled();
    admit();
    compact();
    decode();
    prefill();
    return events();
}

void Batch::cancel(uint64_t id)
{
    // If the prefill begins after the mark is set, it sees that itself; if it ends before it is interrupted, another call may be
    // at work, which is then repeated.
    if (marks_.set(id) && prefilling_id_.load(std::memory_order_seq_cst) == id)
    {
        num_interrupts_.fetch_add(1, std::memory_order_seq_cst);
        engine_.interrupt();
    }
}

void Batch::abandon()
{
    while (!waiting_.empty())
    {
        waiting_.front()->drop();
        (void)waiting_.pop();
        --num_open_;
    }
    for (PendingChoices& pending : pending_)
    {
        while (!pending.sequences.empty())
        {
            pending.sequences.front()->drop();
            (void)pending.sequences.pop();
            --num_open_;
        }
    }
    pending_.clear();
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence != nullptr)
        {
            at(row).sequence->drop();
            retire(row);
        }
    }
}

/** Room for so many events in the next step. Those of the last one stay where they are. */
bool Batch::reserve_events(size_t count)
{
    if (count <= events_capacity_ || count <= next_events_capacity_)
    {
        return true;
    }
    count = std::max(count, 2 * std::max(events_capacity_, next_events_capacity_));
    if (!next_events_.reserve(count))
    {
        return false;
    }
    next_events_capacity_ = count;
    return true;
}

/** Forgets the last step's events, and frees what only they needed. */
void Batch::free_ended()
{
    if (next_events_capacity_ > events_capacity_)
    {
        memory_.events.swap(next_events_);
        std::swap(events_capacity_, next_events_capacity_);
    }
    memory_.events.clear();
    memory_.texts.reset();
    ended_.clear();
    for (Row& row : rows_)
    {
        if (row.held != nullptr)
        {
            row.held->strip();
        }
    }
}

void Batch::retire_cancelled()
{
    SequenceQueue left;
    while (!waiting_.empty())
    {
        Box<ActiveSequence> sequence = waiting_.pop();
        if (sequence->request().is_cancelled())
        {
            sequence->finish(FinishReason::cancelled, memory_);
            end(std::move(sequence));
        }
        else
        {
            left.push(std::move(sequence));
        }
    }
    waiting_ = std::move(left);
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence != nullptr && at(row).sequence->request().is_cancelled())
        {
            at(row).sequence->finish(FinishReason::cancelled, memory_);
            retire(row);
        }
    }
    for (size_t i = 0; i < pending_.size();)
    {
        if (!pending_[i].request->is_cancelled())
        {
            ++i;
            continue;
        }
        while (!pending_[i].sequences.empty())
        {
            Box<ActiveSequence> sequence = pending_[i].sequences.pop();
            sequence->finish(FinishReason::cancelled, memory_);
            end(std::move(sequence));
        }
        pending_.remove(i);
    }
}

/** Gives free rows to choices that are due, then to waiting requests, in their order. The copy with which a step has copied
 *  enough, or one that fails, is the last thing. For a request that follows a prompt in prefill a row stays free. */
void Batch::admit()
{
    SequenceQueue followers;
    int32_t num_followers = 0;
    size_t copied = 0;
    while (copied < kCopyTokens && num_free() > 0)
    {
        size_t due = 0;
        while (due < pending_.size() && !pending_[due].is_due)
        {
            ++due;
        }
        int32_t row;
        int32_t donor;
        Span<float const> logits;
        if (due < pending_.size())
        {
            row = row_to_give();
            donor = row_of(*pending_[due].request);
            logits = begin_choice(row, due);
        }
        else if (!waiting_.empty() && num_followers < num_free())
        {
            if (follows(*waiting_.front()))
            {
                followers.push(waiting_.pop());
                ++num_followers;
                continue;
            }
            row = begin_prompt(waiting_.pop(), &donor);
        }
        else
        {
            break;
        }
        Error error;
        if (donor != row)
        {
            size_t const shared = at(row).sequence->prefilled();
            if (run_copy(donor, row, shared, error) != Status::ok)
            {
                fail(row, error);
                break;
            }
            copied += shared;
        }
        if (!logits.empty())
        {
            advance(row, logits);
        }
    }
    while (!waiting_.empty()) // behind those that came before them
    {
        followers.push(waiting_.pop());
    }
    waiting_ = std::move(followers);
}

/** Seats a request; returns its row. *donor: the one to copy its beginning from (the same: nothing is copied). */
int32_t Batch::begin_prompt(Box<ActiveSequence> sequence, int32_t* donor)
{
    int32_t const row = choose_row(*sequence);
    size_t most = shared(row, *sequence);
    *donor = row;
    for (int32_t each = 0; each < num_rows_; ++each)
    {
        size_t const others = shared(each, *sequence);
        if (others > most)
        {
            most = others;
            *donor = each;
        }
    }
    if (at(row).held != nullptr)
    {
        ended_.push(std::move(at(row).held)); // events of this step may be of it
    }
    at(row).left = 0;
    at(row).sequence = std::move(sequence);
    (void)prefilling_.push(row); // there is room for all rows
    if (*donor == row)
    {
        Error error;
        // There is such a row, and as much in it.
        (void)engine_.truncate(row, static_cast<int64_t>(most), error);
    }
    at(row).sequence->begin_cached(most);
    return row;
}

/** Seats the next choice of a request in a row that is free, or has a choice of it that ended; returns the logits [V] of the
 *  prompt's last token, valid until the next choice begins. */
Span<float const> Batch::begin_choice(int32_t row, size_t pending)
{
    PendingChoices& choices = pending_[pending];
    Box<ActiveSequence> sequence = choices.sequences.pop();
    sequence->share_prompt();
    if (at(row).held != nullptr)
    {
        ended_.push(std::move(at(row).held));
    }
    at(row).left = 0;
    if (at(row).sequence != nullptr)
    {
        end(std::move(at(row).sequence));
    }
    at(row).sequence = std::move(sequence);
    if (choices.sequences.empty())
    {
        spare_logits_.swap(choices.logits);
        pending_.remove(pending);
        return spare_logits_.view();
    }
    return choices.logits.view();
}

/** Moves or empties one row, if that shortens the span of running rows and idle ones have cost as much by now. */
void Batch::compact()
{
    find_running();
    Move move;
    if (!find_move(move))
    {
        idle_cost_ = 0;
        return;
    }
    auto const span = static_cast<size_t>(running_.back() - running_[0]) + 1;
    idle_cost_ += (span - running_.size()) * kTokensPerIdleRow;
    auto const length = static_cast<size_t>(engine_.length(move.source));
    if (idle_cost_ < length)
    {
        return;
    }
    idle_cost_ = 0;
    if (move.source == move.target)
    {
        forget(move.source);
        return;
    }
    Error error;
    if (run_copy(move.source, move.target, length, error) != Status::ok)
    {
        if (at(move.source).sequence != nullptr)
        {
            fail(move.source, error);
        }
        else
        {
            forget(move.source);
        }
        return;
    }
    at(move.target).sequence = std::move(at(move.source).sequence);
    at(move.target).held = std::move(at(move.source).held);
    at(move.target).left = at(move.source).left;
    at(move.target).next = at(move.source).next;
    forget(move.source);
}

/** The row to move and where to, so that fewer idle rows lie between running ones; false: nothing helps.
 *
 *  A running row at either end goes into an empty row between them. If there are only rows there that hold a conversation, the
 *  shortest of these goes out of the way first. If no row is empty, the one that was left longest ago is to be emptied. */
bool Batch::find_move(Move& move) const
{
    if (running_.empty())
    {
        return false;
    }
    int32_t const first = running_[0];
    int32_t const last = running_.back();
    int32_t lowest_empty = -1;
    int32_t lowest_hole = -1;
    int32_t highest_hole = -1;
    int32_t shortest = -1; // that holds a conversation
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence != nullptr)
        {
            continue;
        }
        bool const is_between = first < row && row < last;
        if (at(row).held == nullptr)
        {
            lowest_empty = lowest_empty < 0 ? row : lowest_empty;
            lowest_hole = is_between && lowest_hole < 0 ? row : lowest_hole;
            highest_hole = is_between ? row : highest_hole;
        }
        else if (is_between && (shortest < 0 || at(row).held->kept < at(shortest).held->kept))
        {
            shortest = row;
        }
    }
    if (lowest_hole >= 0)
    {
        int32_t const without_last = std::max(running_[running_.size() - 2], lowest_hole) - first;
        int32_t const without_first = last - std::min(running_[1], highest_hole);
        move = without_last <= without_first ? Move{last, lowest_hole} : Move{first, highest_hole};
        return true;
    }
    if (shortest < 0)
    {
        return false;
    }
    int32_t const oldest = row_to_give();
    move = lowest_empty >= 0 ? Move{shortest, lowest_empty} : Move{oldest, oldest};
    return true;
}

void Batch::decode()
{
    find_running();
    if (running_.empty())
    {
        return;
    }
    int32_t const first = running_[0];
    ids_.clear();
    for (int32_t row = first; row <= running_.back(); ++row)
    {
        (void)ids_.push(at(row).next); // there is room for all rows
    }
    double const started = system::seconds();
    float const* logits = nullptr;
    Error error;
    Status const status = run_decode(first, ids_.view(), &logits, error);
    if (status != Status::ok)
    {
        bool has_failed = false;
        for (int32_t const row : bad_rows_)
        {
            // Only a row that was in it: the others repeat their token.
            if (status == Status::not_finite && std::binary_search(running_.begin(), running_.end(), row)
                && at(row).sequence != nullptr)
            {
                fail(row, error);
                has_failed = true;
            }
        }
        for (size_t i = 0; i < running_.size() && !has_failed; ++i)
        {
            fail(running_[i], error);
        }
        return;
    }
    double const seconds = system::seconds() - started;
    for (int32_t const row : running_)
    {
        ActiveSequence& sequence = *at(row).sequence;
        if (!sequence.is_prefilled())
        {
            sequence.note_fed(1, seconds);
        }
        advance(row, {logits + static_cast<size_t>(row - first) * vocab_size_, vocab_size_});
    }
}

/** Prefills one chunk of the row whose turn it is. */
void Batch::prefill()
{
    if (prefilling_.empty())
    {
        return;
    }
    find_running();
    int32_t const row = prefilling_[0];
    ActiveSequence& sequence = *at(row).sequence;
    size_t const most = running_.empty() ? kChunkAlone : kChunkBesideDecode;
    size_t size = std::min(most, static_cast<size_t>(engine_.manifest().prefill_chunk));
    size = sequence.request().has_prompt_logprobs() ? 1 : size;
    size = std::min(size, sequence.prompt().size() - sequence.prefilled());
    double const started = system::seconds();
    float const* logits = nullptr;
    Error error;
    Status const status = run_prefill(row, sequence.prompt().view().sub(sequence.prefilled(), size), &logits, error);
    if (status == Status::cancelled && sequence.request().is_cancelled())
    {
        return; // the next step ends it, as it does what is cancelled at any other time
    }
    if (status != Status::ok)
    {
        fail(row, error);
        return;
    }
    sequence.note_fed(size, system::seconds() - started);
    prefilling_.remove(0);
    if (!sequence.is_running())
    {
        (void)prefilling_.push(row); // there is room for all rows
        return;
    }
    advance(row, {logits, vocab_size_});
}

/** Writes down the rows whose next token is known. */
void Batch::find_running()
{
    running_.clear();
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence != nullptr && at(row).sequence->is_running())
        {
            (void)running_.push(row); // there is room for all rows
        }
    }
}

/** Chooses a row's next token from logits [V]; if that ends it, the row goes to a choice that is due. */
void Batch::advance(int32_t row, Span<float const> logits)
{
    ActiveSequence* sequence = at(row).sequence.get();
    if (!sequence->is_prefilled())
    {
        if (!sequence->read_prompt(logits, memory_, &at(row).next))
        {
            Error error;
            (void)error.no_memory("log-probabilities");
            fail(row, error);
        }
        return;
    }
    ActiveRequest const& request = sequence->request();
    size_t pending = find_pending(request);
    if (pending != kNone && !pending_[pending].is_due)
    {
        std::copy(logits.begin(), logits.end(), pending_[pending].logits.begin());
        pending_[pending].is_due = true;
    }
    while (sequence->advance(logits, memory_))
    {
        pending = find_pending(request);
        if (pending == kNone)
        {
            retire(row);
            return;
        }
        Error error;
        // There is such a row, and as much in it.
        (void)engine_.truncate(row, static_cast<int64_t>(sequence->prompt().size()), error);
        logits = begin_choice(row, pending);
        sequence = at(row).sequence.get();
    }
    at(row).next = sequence->tokens().back();
}

/** Frees the row of a sequence that has ended. */
void Batch::retire(int32_t row)
{
    Box<ActiveSequence> sequence = vacate(row);
    at(row).next = kIdle;
    auto const length = static_cast<size_t>(engine_.length(row));
    if (sequence->request().keep_cache && length > 0)
    {
        sequence->kept = std::min(length, sequence->prompt().size() + sequence->tokens().size());
        at(row).left = ++num_left_;
        at(row).held = std::move(sequence);
        --num_open_;
        return;
    }
    end(std::move(sequence));
    forget(row);
}

/** Frees a row whose step failed, and what it held; without another row, choices that are left fail too. */
void Batch::fail(int32_t row, Error const& error)
{
    Box<ActiveSequence> sequence = vacate(row);
    forget(row);
    sequence->fail(error, memory_);
    size_t const pending = find_pending(sequence->request());
    if (pending != kNone && row_of(sequence->request()) < 0)
    {
        while (!pending_[pending].sequences.empty())
        {
            Box<ActiveSequence> other = pending_[pending].sequences.pop();
            other->fail(error, memory_);
            end(std::move(other));
        }
        pending_.remove(pending);
    }
    end(std::move(sequence));
}

/** Takes the sequence out of a row. */
Box<ActiveSequence> Batch::vacate(int32_t row)
{
    for (size_t i = 0; i < prefilling_.size(); ++i)
    {
        if (prefilling_[i] == row)
        {
            prefilling_.remove(i);
            break;
        }
    }
    return std::move(at(row).sequence);
}

/** Empties a free row. */
void Batch::forget(int32_t row)
{
    if (at(row).held != nullptr)
    {
        ended_.push(std::move(at(row).held));
    }
    at(row).next = kIdle;
    at(row).left = 0;
    Error error;
    // There is such a row; an empty one isn't refused.
    (void)engine_.truncate(row, 0, error);
}

/** Keeps a sequence that has ended as long as its events are valid. */
void Batch::end(Box<ActiveSequence> sequence)
{
    --num_open_;
    ended_.push(std::move(sequence));
}

/** Where a request's choices that haven't begun are; kNone: it has none. */
size_t Batch::find_pending(ActiveRequest const& request) const
{
    for (size_t i = 0; i < pending_.size(); ++i)
    {
        if (pending_[i].request.get() == &request)
        {
            return i;
        }
    }
    return kNone;
}

/** The lowest row of a request; -1: it has none. */
int32_t Batch::row_of(ActiveRequest const& request) const
{
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence != nullptr && &at(row).sequence->request() == &request)
        {
            return row;
        }
    }
    return -1;
}

/** How many rows have no sequence. */
int32_t Batch::num_free() const
{
    auto const is_free = [](Row const& row) { return row.sequence == nullptr; };
    return static_cast<int32_t>(std::count_if(rows_.begin(), rows_.end(), is_free));
}

/** The lowest empty row, or the free one that was left longest ago, whose content is dropped; one is free. */
int32_t Batch::row_to_give() const
{
    int32_t best = -1;
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        if (at(row).sequence == nullptr && (best < 0 || at(row).left < at(best).left))
        {
            best = row;
        }
    }
    return best;
}

/** The free row for a request: the one that it shares most with, of equals the one that was left longest ago; one is free.
 *
 *  But `row_to_give` where that would cost another conversation more than it saves: two of them may share a system prompt and
 *  nothing else. */
int32_t Batch::choose_row(ActiveSequence const& sequence) const
{
    int32_t best = row_to_give();
    size_t most = shared(best, sequence);
    for (int32_t row = 0; row < num_rows_; ++row)
    {
        size_t const each = at(row).sequence == nullptr ? shared(row, sequence) : 0;
        if (each > most || (each == most && each > 0 && at(row).left < at(best).left))
        {
            best = row;
            most = each;
        }
    }
    size_t const lost = at(best).held == nullptr ? 0 : at(best).held->kept - most;
    return 2 * lost > most ? row_to_give() : best;
}

/** How many tokens in a row a request can start from; the last of its prompt are left to compute.
 *
 *  Only what was, or is being, kept for other requests of its scope counts, and only for a request that keeps its own. */
size_t Batch::shared(int32_t row, ActiveSequence const& sequence) const
{
    ActiveSequence const* content = at(row).held.get();
    size_t length = content == nullptr ? 0 : content->kept;
    if (at(row).sequence != nullptr && at(row).sequence->request().keep_cache)
    {
        content = at(row).sequence.get();
        length = static_cast<size_t>(engine_.length(row));
        length = std::min(length, content->prompt().size() + content->tokens().size());
    }
    if (content == nullptr || !sequence.request().reuses_cache()
        || content->request().cache_scope != sequence.request().cache_scope
        || rotary_table(*content) != rotary_table(sequence))
    {
        return 0;
    }
    return common_beginning(sequence.prompt(), *content, length);
}

/** The rotary table of a request: its prompt's, which the output keeps. */
int64_t Batch::rotary_table(ActiveSequence const& sequence) const
{
    return engine_.manifest().text_engine.rotary_table(static_cast<int64_t>(sequence.prompt().size()));
}

/** Whether a prompt in prefill begins as a request does, goes on so, and no row has more of that by now. */
bool Batch::follows(ActiveSequence const& sequence) const
{
    if (!sequence.request().reuses_cache())
    {
        return false;
    }
    for (int32_t const row : prefilling_)
    {
        ActiveSequence const& other = *at(row).sequence;
        if (!other.request().reuses_cache() || other.request().cache_scope != sequence.request().cache_scope
            || rotary_table(other) != rotary_table(sequence))
        {
            continue;
        }
        size_t const common = common_beginning(sequence.prompt(), other, other.prompt().size());
        if (common < kChunkBesideDecode || common <= other.prefilled())
        {
            continue;
        }
        size_t most = 0;
        for (int32_t each = 0; each < num_rows_; ++each)
        {
            most = std::max(most, shared(each, sequence));
        }
        if (most == other.prefilled())
        {
            return true;
        }
    }
    return false;
}

/** Whether a call was ended by an interrupt that was meant for another one: it came too late. */
bool Batch::is_somebody_elses(Status status)
{
    // An engine that says so more often than it was interrupted has failed.
    if (status != Status::cancelled || num_answered_ >= num_interrupts_.load(std::memory_order_seq_cst))
    {
        return false;
    }
    ++num_answered_;
    return true;
}

Status Batch::run_prefill(int32_t row, Span<int32_t const> ids, float const** logits, Error& error)
{
    ActiveRequest const& request = at(row).sequence->request();
    prefilling_id_.store(request.id, std::memory_order_seq_cst);
    Status status;
    do
    {
        status = request.is_cancelled() ? Status::cancelled
                                        : engine_.prefill(row, ids, at(row).sequence->prompt().size(), logits, error);
    } while (!request.is_cancelled() && is_somebody_elses(status));
    prefilling_id_.store(0, std::memory_order_seq_cst);
    return status;
}

Status Batch::run_decode(int32_t first_row, Span<int32_t const> ids, float const** logits, Error& error)
{
    Status status;
    do
    {
        bad_rows_.clear();
        status = engine_.decode(first_row, ids, logits, &bad_rows_, error);
    } while (is_somebody_elses(status));
    return status;
}

Status Batch::run_copy(int32_t source, int32_t target, size_t length, Error& error)
{
    Status status;
    do
    {
        status = engine_.copy_row(source, target, static_cast<int64_t>(length), error);
    } while (is_somebody_elses(status));
    return status;
}

} // namespace qwen_aot
